"""DFlash on Transformers: the embedded engine."""

from dflash_plugin.transformers.engine import Engine, Request, Result
from dflash_plugin.transformers.loading import load_drafter, load_target

__all__ = ["Engine", "Request", "Result", "load_drafter", "load_target"]
