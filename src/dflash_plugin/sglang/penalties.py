"""Penalties under speculation, exactly as the target alone applies them.

A draft changes the penalties of the rows behind it in its block, so every row of a verify pass has
its own penalties. The counts of each request's output tokens live on the device, because the host
does not know the last pass's tokens yet when the next pass starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_plugin.sglang.protocols import RequestLike, SamplingInfoLike

# Attribute of a request: float32 [V], how often each token stands in its output.
COUNTS = "_dflash_token_counts"


@dataclass(frozen=True)
class Penalties:
    """Penalties of a batch of B requests.

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

    def apply(self, logits: Tensor, drafts: Tensor, requests: Tensor, places: Tensor) -> None:
        """Penalize the logits of a verify pass in place.

        Args:
            logits: [N, V], of the tokens after the verified rows.
            drafts: int64 [B, K], token ids.
            requests: int64 [N], the request of each row.
            places: int64 [N], the row's place in its block; place 0 is the anchor's.
        """
        counts = self.counts[requests]
        # Draft k counts for the rows behind it.
        seen = torch.arange(drafts.shape[1], device=logits.device) < places[:, None]
        counts.scatter_add_(1, drafts[requests], seen.to(counts.dtype))
        present = counts > 0
        logits -= self.frequency[requests] * counts + self.presence[requests] * present
        if self.stop is not None:
            early = places[:, None] < self.remaining[requests]
            logits.masked_fill_(early & self.stop[requests], float("-inf"))
        scale = torch.where(present, self.repetition[requests], 1.0)
        logits.copy_(torch.where(logits < 0, logits * scale, logits / scale))


def are_asked_for(sampling_info: SamplingInfoLike) -> bool:
    """Whether a batch has penalties, by what SGLang prepared for it."""
    orchestrator = sampling_info.penalizer_orchestrator
    return (
        sampling_info.acc_additive_penalties is not None
        or sampling_info.acc_scaling_penalties is not None
        or bool(orchestrator is not None and orchestrator.is_required)
    )


def without_native(sampling_info: SamplingInfoLike) -> None:
    """Remove SGLang's own penalties, which do not know a pass's earlier tokens, from a batch."""
    sampling_info.acc_additive_penalties = None
    sampling_info.acc_scaling_penalties = None


def begin(requests: Sequence[RequestLike], vocabulary: int, device: torch.device) -> None:
    """Start the counts of requests that are prefilled; a retracted one has output already."""
    for request in requests:
        output = torch.tensor(list(request.output_ids), dtype=torch.int64)
        setattr(request, COUNTS, torch.bincount(output, minlength=vocabulary).float().to(device))


def gather(requests: Sequence[RequestLike], written: Tensor, vocabulary: int) -> Penalties:
    """Penalties of a batch.

    Args:
        requests: B requests; ``begin`` was called for those with penalties.
        written: int64 [B], number of output tokens so far.
        vocabulary: V, number of tokens.
    """
    # A request without counts was prefilled in a batch without penalties, so it has none itself.
    none = torch.zeros(vocabulary, device=written.device)
    counts = torch.stack([vars(request).get(COUNTS, none) for request in requests])
    for row, request in enumerate(requests):
        setattr(request, COUNTS, counts[row])
    device = counts.device
    params = [request.sampling_params for request in requests]
    min_tokens = [p.min_new_tokens for p in params]
    stop = None
    if any(min_tokens):
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
        remaining=(to_device(min_tokens, device) - written)[:, None],
        stop=stop,
    )


def count(penalties: Penalties, tokens: Tensor, number: Tensor) -> None:
    """Count committed tokens.

    Args:
        penalties: of the batch; its counts are changed in place, and are those of the requests.
        tokens: int64 [B, T]; tokens that were not committed may have any value.
        number: int64 [B], number of committed tokens, the first ones.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    committed = (index < number[:, None]).float()
    penalties.counts.scatter_add_(1, tokens.clamp(min=0), committed)


def _stop_tokens(request: RequestLike, vocabulary: int) -> list[int]:
    tokenizer = request.tokenizer
    found = set(request.sampling_params.stop_token_ids or ())
    found |= set(request.eos_token_ids or ())
    if tokenizer is not None:
        found |= set(tokenizer.additional_stop_token_ids or ())
        found.add(tokenizer.eos_token_id)
    return sorted(token for token in found if token is not None and token < vocabulary)


def to_device(values: Sequence[int] | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Copy host values to the device, without waiting for the copy."""
    values = torch.as_tensor(values)
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
