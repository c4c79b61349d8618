"""Measuring speculative decoding: a sweep over a server or the Transformers engine, and its report.

``sweep.py`` drives; ``vllm_server.py``, ``sglang_server.py`` and ``embedded.py`` are what it can
measure; ``averages.py`` makes the numbers, ``record.py`` is the file they go to, ``report.py`` the
page made of it.
"""
