"""DFlash speculative decoding: one drafter core for Transformers, vLLM and SGLang."""

__version__ = "0.1.0"
