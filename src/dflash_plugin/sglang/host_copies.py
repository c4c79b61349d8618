"""Copies from the host to the GPU that nothing waits for, where SGLang's worker waits.

Behind a prompt's pass, the worker sends the prompts' lengths by ``torch.tensor(list, device=…)``,
which returns once the GPU has done everything before it: the decode step that runs, and the
prompts. All the work of the host until the next step then finds the GPU idle. With many requests
that is after most steps. SGLang 0.5.23 no longer waits there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dflash_plugin.sglang.patches import WORKER_MODULE
from dflash_plugin.sglang.surface import surface


class Torch:
    """``torch``, but for ``tensor``: the module that SGLang's worker finds under that name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """``torch.tensor``, which does not wait where numbers of the host go to a GPU."""
        if device is None or torch.device(device).type != "cuda" or isinstance(data, Tensor):
            return torch.tensor(data, device=device, **kwargs)
        on_host = torch.tensor(data, pin_memory=True, **kwargs)
        return on_host.to(device, non_blocking=True)


def send_without_waiting() -> None:
    """Let SGLang's worker send numbers to the GPU without waiting for it."""
    surface().patch(WORKER_MODULE, "torch", lambda native: Torch())
