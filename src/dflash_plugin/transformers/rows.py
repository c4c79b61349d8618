"""The engine's device state: one row for each running request, at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_plugin.decoding.draft_tree import DraftTree
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.transformers.requests import Request

MAX_STOP_IDS = 8


class RowTensors:
    """What a step reads and writes of every running request.

    Args:
        batch: requests that run at the same time, B.
        block: tokens that a verify pass commits at most, R.
        feature_width: n * target_hidden.
        dtype: of the target.
        device: of all tensors.
        tree_rows: rows of a draft tree beside its chain, at most.

    Attributes:
        anchors: int64 [B], the last committed tokens.
        lengths: int64 [B], the anchors' positions; 0 in an idle row.
        remaining: int64 [B], tokens that each request may still write.
        stops: int64 [B, MAX_STOP_IDS], padded with -1.
        drafts: int64 [B, R - 1].
        draft_probs: [B, R - 1, vocab] that the drafts were drawn from; None until some were drawn.
        own_probs: [B, R - 1, vocab], the drafter's own distributions; None until one is needed.
        seeded: bool [B], requests that gave a seed.
        features: [B, R, feature_width], of the last verify pass.
        feature_positions: int64 [B, R]; -1 drops a feature.
        outcome: int64 [B, 2 * R + 3]: tokens committed, finish reason, drafts accepted, then the R
            tokens, then the rows of a tree that were accepted.
        tree: of the last draft pass that made one; None without tree rows.
        sampling: of every request.
    """

    def __init__(
        self,
        batch: int,
        block: int,
        feature_width: int,
        dtype: torch.dtype,
        device: torch.device,
        tree_rows: int = 0,
    ) -> None:
        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.device = device
        self.anchors = integers(batch)
        self.lengths = integers(batch)
        self.remaining = integers(batch)
        self.stops = integers(batch, MAX_STOP_IDS, fill=-1)
        self.drafts = integers(batch, block - 1)
        self.draft_probs: Tensor | None = None
        self.own_probs: Tensor | None = None
        self.seeded = torch.zeros(batch, dtype=torch.bool, device=device)
        self.features = torch.zeros(batch, block, feature_width, dtype=dtype, device=device)
        self.feature_positions = integers(batch, block, fill=-1)
        self.outcome = integers(batch, 2 * block + 3)
        self.sampling = SamplingTensors.build([SamplingParams()] * batch, device)
        self.tree: DraftTree | None = None
        if tree_rows:
            rows = block + tree_rows
            self.tree = DraftTree(
                tokens=integers(batch, rows),
                parents=integers(batch, rows),
                depths=integers(batch, rows),
                mask=torch.zeros(batch, rows, rows, dtype=torch.bool, device=device),
            )

    def load(self, rows: Tensor, requests: Sequence[Request], stop_ids: Sequence[int]) -> None:
        """Fill rows int64 [N] with requests whose prompts have run.

        Args:
            rows: one for each request.
            requests: N of them.
            stop_ids: of requests that name none.
        """
        stops = torch.full((len(requests), MAX_STOP_IDS), -1, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids = stop_ids if request.stop_ids is None else request.stop_ids
            stops[row, : len(ids)] = torch.as_tensor(list(ids), dtype=torch.int64)
        self.stops[rows] = stops.to(self.device)
        lengths = [len(request.prompt) for request in requests]
        self.lengths[rows] = torch.as_tensor(lengths, device=self.device)
        limits = [request.max_new_tokens for request in requests]
        self.remaining[rows] = torch.as_tensor(limits, device=self.device)
        seeded = [request.sampling.seed is not None for request in requests]
        self.seeded[rows] = torch.as_tensor(seeded, device=self.device)
        sampling = SamplingTensors.build([request.sampling for request in requests], self.device)
        for destination, source in zip(self.sampling, sampling, strict=True):
            destination[rows] = source

    def move(self, source: int, destination: int) -> None:
        """Copy one request's state to another row."""
        for tensor in (
            self.anchors,
            self.lengths,
            self.remaining,
            self.stops,
            self.seeded,
            self.features,
            self.feature_positions,
            *self.sampling,
        ):
            tensor[destination] = tensor[source].clone()

    def keep_tree(self, tree: DraftTree) -> None:
        """Take the trees of the first rows."""
        assert self.tree is not None
        batch, rows = tree.tokens.shape
        kept = self.tree_of(batch, rows)
        for destination, source in zip(kept, tree, strict=True):
            destination.copy_(source)

    def tree_of(self, batch: int, rows: int) -> DraftTree:
        """The first ``rows`` of the trees of the first requests, without a copy."""
        assert self.tree is not None
        return DraftTree(*(tensor[:batch] for tensor in self.tree)).first(rows)

    def sampling_of(self, batch: int) -> SamplingTensors:
        """Sampling parameters of the first ``batch`` rows, without a copy."""
        return SamplingTensors(*(tensor[:batch] for tensor in self.sampling))
