"""Memory that SGLang's LoRA asks to be pinned, on a machine without a GPU to pin it for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Unpinned(TorchFunctionMode):
    """Leaves all memory as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        named = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        return func(*args, **named)


def turn_on() -> None:
    """For the rest of this process's main thread."""
    Unpinned().__enter__()
