"""Measuring speculative decoding: a sweep over a server or the Transformers engine, and its report.

``sweep.py`` drives. ``vllm_server.py``, ``sglang_server.py`` and ``embedded.py`` are what it can
measure. ``metrics.py`` makes the numbers, ``schema.py`` is the file they go to, ``report.py`` makes
a page of it. ``evaluate.py`` compares engines in this process without a sweep.
"""
