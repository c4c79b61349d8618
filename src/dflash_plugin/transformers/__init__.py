"""DFlash on Transformers: the embedded engine."""

from dflash_plugin.transformers.engine import Engine
from dflash_plugin.transformers.loading import load_drafter, load_target
from dflash_plugin.transformers.requests import Request, Result

__all__ = ["Engine", "Request", "Result", "load_drafter", "load_target"]
