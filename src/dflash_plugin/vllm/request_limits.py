"""Top-k and top-p of the V2 runner's requests, where a selector's walk reads them.

vLLM tells its speculators temperatures and seeds alone. It refuses min-p beside a drafter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dflash_plugin.kernels.select_path import Limits
from dflash_plugin.vllm.protocols import SamplingStates


class RequestLimits:
    """The limits of all request slots, in buffers that a captured pass may read.

    vLLM's own tensors move with every step.

    Args:
        slots: R, request slots of the runner.
        device: where drafts are made.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.states: SamplingStates | None = None
        self._top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self._top_p = torch.ones(slots, dtype=torch.float32, device=device)
        self._min_p = torch.zeros(slots, dtype=torch.float32, device=device)
        self._copied_top_k = np.zeros(slots, dtype=np.int32)
        self._copied_top_p = np.ones(slots, dtype=np.float32)

    def refresh(self) -> None:
        """Take over the runner's limits; copies only what has changed since the last step."""
        states = self.states
        if states is None:  # While the target is loaded, and in profiling.
            return
        if not np.array_equal(self._copied_top_k, states.top_k.np):
            self._top_k.copy_(states.top_k.gpu)
            self._copied_top_k[:] = states.top_k.np
        if not np.array_equal(self._copied_top_p, states.top_p.np):
            self._top_p.copy_(states.top_p.gpu)
            self._copied_top_p[:] = states.top_p.np

    def of(self, requests: Tensor) -> Limits:
        """Limits of requests int64 [B], their slots given."""
        no_min_p = self._min_p[: len(requests)]
        return Limits(self._top_k[requests], self._top_p[requests], no_min_p)
