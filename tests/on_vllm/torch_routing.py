"""The routing of experts in torch, for a vLLM on a GPU whose build lacks its kernels for experts.

The products of the experts themselves are Triton kernels, which need no build.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

# Experts of padding rows stay as they are, and groups of experts are chosen in torch by vLLM.
ENVIRONMENT = {"VLLM_MOE_SKIP_PADDING": "0", "VLLM_USE_FUSED_MOE_GROUPED_TOPK": "0"}


def turn_on_where_missing() -> bool:
    """Replace vLLM's kernels in this process if it has none; returns whether it has none."""
    names = ("vllm._moe_C", "vllm._moe_C_stable_libtorch")
    if any(find_spec(name) is not None for name in names):
        return False
    from vllm import _custom_ops

    for function in (topk_softmax, topk_sigmoid, moe_align_block_size, moe_sum):
        setattr(_custom_ops, function.__name__, function)
    return True


def topk_softmax(
    weights: Tensor,
    ids: Tensor,
    indices: Tensor,
    logits: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """Write the weights [N, k] and ids [N, k] of each row's best experts by logits [N, experts].

    ``indices`` [N, k] is what vLLM's kernel notes for itself.
    """
    scores = logits.float().softmax(dim=-1)
    _choose(weights, ids, scores, renormalize, e_score_correction_bias, 1.0)


def topk_sigmoid(
    weights: Tensor,
    ids: Tensor,
    indices: Tensor,
    logits: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> None:
    """As ``topk_softmax``, by another score."""
    scores = logits.float().sigmoid()
    _choose(weights, ids, scores, renormalize, e_score_correction_bias, routed_scaling_factor)


def _choose(
    weights: Tensor,
    ids: Tensor,
    scores: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    factor: float,
) -> None:
    biased = scores if bias is None else scores + bias
    best = biased.topk(ids.shape[1], dim=-1).indices
    found = scores.gather(1, best)
    if renormalize:
        found = found / found.sum(dim=-1, keepdim=True)
    weights.copy_(found * factor)
    ids.copy_(best)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    """Sort the chosen experts into blocks of one expert each; waits for no device.

    Args:
        topk_ids: [N, k], each below ``num_experts``.
        num_experts: of the layer.
        block_size: entries of a block.
        sorted_token_ids: int32 [P], written: the places in ``topk_ids`` by expert, and N * k where
            a block is filled up.
        experts_ids: int32 [blocks], written: the expert of each block.
        num_tokens_post_pad: int32 [1], written: entries in use.
        expert_map: not taken.
        scatter_idx: not taken.
    """
    assert expert_map is None
    assert scatter_idx is None
    chosen = topk_ids.flatten().long()
    experts = torch.arange(num_experts, device=chosen.device)
    counts = (chosen[:, None] == experts).sum(dim=0)
    padded = (counts + block_size - 1) // block_size * block_size
    ends = padded.cumsum(0)
    order = chosen.argsort(stable=True)
    rank = (
        torch.arange(len(chosen), device=chosen.device) - (counts.cumsum(0) - counts)[chosen[order]]
    )
    sorted_token_ids.fill_(len(chosen))
    sorted_token_ids[(ends - padded)[chosen[order]] + rank] = order.to(sorted_token_ids.dtype)
    starts = torch.arange(len(experts_ids), device=chosen.device) * block_size
    owners = torch.searchsorted(ends, starts, right=True).clamp(max=num_experts - 1)
    experts_ids.copy_(owners)
    num_tokens_post_pad.copy_(ends[-1:])


def moe_sum(
    values: Tensor,
    output: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> None:
    """Write the sums [N, hidden] of ``values`` [N, k, hidden]."""
    assert expert_map is None
    output.copy_(values.sum(dim=1))
