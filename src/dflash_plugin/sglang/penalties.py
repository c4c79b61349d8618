"""Penalties under speculation, exactly as the target alone applies them.

A draft changes the penalties of what follows it in its block, so every row of a verify pass has its
own. Counts of each request's output tokens live on the device: the host does not know the last
pass's tokens yet when the next one starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COUNTS = "_dflash_token_counts"


@dataclass(frozen=True)
class Penalties:
    """Penalties of a batch.

    Attributes:
        frequency, presence, repetition: float32 [B, 1].
        counts: float32 [B, V], how often each token stands in the output so far.
        remaining: int64 [B, 1], tokens that must still come before a stop token may.
        stop: bool [B, V], the stop tokens, or None where no request has a minimum length.
    """

    frequency: Tensor
    presence: Tensor
    repetition: Tensor
    counts: Tensor
    remaining: Tensor
    stop: Tensor | None

    def apply(self, logits: Tensor, drafts: Tensor) -> None:
        """Penalise a block's logits in place.

        Args:
            logits: [B, K + 1, V], after the anchor and after each draft.
            drafts: int64 [B, K].
        """
        batch, rows, vocabulary = logits.shape
        counts = self.counts[:, None].expand(batch, rows, vocabulary).clone()
        # Draft k counts for the rows behind it.
        seen = torch.ones(rows, rows - 1, device=logits.device).tril(-1)
        counts.scatter_add_(
            2, drafts[:, None].expand(batch, rows, rows - 1), seen.expand(batch, rows, rows - 1)
        )
        present = counts > 0
        logits -= self.frequency[:, None] * counts + self.presence[:, None] * present
        if self.stop is not None:
            place = torch.arange(rows, device=logits.device)
            early = place < self.remaining
            logits.masked_fill_(early[..., None] & self.stop[:, None], float("-inf"))
        scale = torch.where(present, self.repetition[:, None], 1.0)
        logits.copy_(torch.where(logits < 0, logits * scale, logits / scale))


def are_asked_for(sampling_info: Any) -> bool:
    """Whether a batch has penalties; read off what SGLang prepared, without a look at requests."""
    orchestrator = sampling_info.penalizer_orchestrator
    return (
        sampling_info.acc_additive_penalties is not None
        or sampling_info.acc_scaling_penalties is not None
        or bool(orchestrator is not None and orchestrator.is_required)
    )


def without_native(sampling_info: Any) -> None:
    """Take SGLang's own penalties, which do not know earlier tokens, off a forward's copy."""
    sampling_info.acc_additive_penalties = None
    sampling_info.acc_scaling_penalties = None


def begin(requests: Sequence[Any], vocabulary: int, device: torch.device) -> None:
    """Count what requests have written before a prefill: nothing, or all if they were retracted."""
    for request in requests:
        output = torch.tensor(list(request.output_ids), dtype=torch.int64)
        setattr(request, COUNTS, torch.bincount(output, minlength=vocabulary).float().to(device))


def gather(requests: Sequence[Any], written: Tensor, vocabulary: int) -> Penalties:
    """Penalties of a batch.

    Args:
        requests: B of SGLang's requests; those with penalties have begun.
        written: int64 [B], tokens of the output so far.
        vocabulary: V.
    """
    # Prefilled among requests without penalties: it has none, so its counts do not matter.
    none = torch.zeros(vocabulary, device=written.device)
    counts = torch.stack([getattr(request, COUNTS, none) for request in requests])
    for row, request in enumerate(requests):
        setattr(request, COUNTS, counts[row])
    device = counts.device
    params = [request.sampling_params for request in requests]
    least = [p.min_new_tokens for p in params]
    stop = None
    if any(least):
        stop = torch.zeros(counts.shape, dtype=torch.bool)
        for row, request in enumerate(requests):
            stop[row, _stop_tokens(request, counts.shape[1])] = True
        stop = to_device(stop, device)

    def column(values: list[float]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.float32), device)[:, None]

    return Penalties(
        frequency=column([p.frequency_penalty for p in params]),
        presence=column([p.presence_penalty for p in params]),
        repetition=column([p.repetition_penalty for p in params]),
        counts=counts,
        remaining=(to_device(least, device) - written)[:, None],
        stop=stop,
    )


def count(penalties: Penalties, tokens: Tensor, number: Tensor) -> None:
    """Count committed tokens.

    Args:
        penalties: of the batch; its counts are the requests' own.
        tokens: int64 [B, T]; what was not committed may be anything.
        number: int64 [B], how many of them were committed.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    committed = (places < number[:, None]).float()
    penalties.counts.scatter_add_(1, tokens.clamp(min=0), committed)


def _stop_tokens(request: Any, vocabulary: int) -> list[int]:
    tokenizer = request.tokenizer
    found = set(request.sampling_params.stop_token_ids or ())
    found |= set(request.eos_token_ids or ())
    if tokenizer is not None:
        found |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())
        found.add(tokenizer.eos_token_id)
    return sorted(token for token in found if token is not None and token < vocabulary)


def to_device(values: Sequence[int] | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Host values on the device, without waiting for it."""
    values = torch.as_tensor(values)
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
