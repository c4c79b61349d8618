"""Small Triton kernels, one op a file, each with its naive torch twin beside it.

``dflash_plugin.kernels.<op>`` holds ``<op>`` and ``<op>_naive``, which take the same arguments.
Calling ``<op>`` runs the kernel where kernels run, and the twin elsewhere: ``with_twin`` chooses,
and no caller does. Op files can be imported without Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Looked for once: an engine that compiles the drafter traces the question, not a search.
_HAS_TRITON = find_spec("triton") is not None
_forced: bool | None = None


def available(device: torch.device) -> bool:
    """Whether kernels run on ``device``; elsewhere their twins do."""
    if _forced is not None:
        return _forced
    return device.type == "cuda" and _HAS_TRITON


@contextmanager
def forced(run_kernels: bool) -> Iterator[None]:
    """For tests: run kernels on every device (under Triton's interpreter on a CPU), or none."""
    global _forced
    before, _forced = _forced, run_kernels
    try:
        yield
    finally:
        _forced = before


def with_twin(launch: Callable[P, R]) -> Callable[P, R]:
    """Make a kernel's wrapper ``op`` run ``op_naive`` of its file where kernels do not run.

    Args:
        launch: checks its arguments and launches the kernel. Its first argument is a tensor, or a
            named tuple of which the first field is one; that tensor's device decides.
    """

    @wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if available(_device(args[0])):
            return launch(*args, **kwargs)
        twin: Callable[P, R] = launch.__globals__[f"{launch.__name__}_naive"]
        return twin(*args, **kwargs)

    return run


def _device(argument: Any) -> torch.device:
    return argument.device if isinstance(argument, Tensor) else _device(argument[0])
