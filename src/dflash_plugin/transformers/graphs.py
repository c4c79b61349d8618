"""CUDA graphs, one per step function and batch shape; on a CPU the function simply runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Captures step functions that read and write tensors at fixed addresses."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run ``step``: eagerly the first time with this ``key``, then from its graph.

        ``step`` must not synchronize, and must take its inputs from and leave its results in
        tensors that outlive it.
        """
        if not self.enabled:
            step()
            return
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._graphs[key] = graph
