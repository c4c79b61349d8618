"""Triton, or a stand-in where it is not installed, so that op files can be imported anywhere."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

__all__ = ["gdc_launch_dependents", "gdc_wait", "tl", "triton"]


class _NoTriton:
    """Lets kernels be defined, and raises when one is launched."""

    def __getattr__(self, name: str) -> _NoTriton:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _NoTriton:
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("Triton is not installed, so no kernel can be launched: install triton")


try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    if find_spec("triton") is not None:  # Installed, but too old.
        raise
    triton = tl = gdc_launch_dependents = gdc_wait = _NoTriton()
