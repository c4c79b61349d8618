"""Gated delta rules on a CPU in verify passes of any number of rows, as vLLM's on a GPU take them.

vLLM's convolution on a CPU takes as many rows of a request in each pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def turn_on() -> None:
    """Replace it in this process."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    gdn_attention._spec_forward = forward


def forward(
    layer: Any,
    metadata: Any,
    mixed_qkv: Tensor,
    b: Tensor,
    a: Tensor,
    windows: Tensor,
    states: Tensor,
    width: int,
    state_len: int,
) -> Tensor:
    """The convolution of each request's rows, and vLLM's kernel of the delta rule behind it.

    Args:
        layer: vLLM's.
        metadata: of the pass.
        mixed_qkv: [N, D], of the requests that verify.
        b, a: [N, heads].
        windows: [slots, D, state_len], what the convolution has seen before: its next window begins
            where the rows end that were accepted.
        states: of the delta rule.
        width: of the convolution.
        state_len: of ``windows``.
    """
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _unpacked_conv_weight

    requests = metadata.num_spec_decodes
    slots = metadata.spec_state_indices_tensor[:requests]
    starts = metadata.spec_query_start_loc[: requests + 1]
    accepted = metadata.num_accepted_tokens[:requests]
    weight, out = _unpacked_conv_weight(layer)[:, None], torch.empty_like(mixed_qkv)
    bounds = starts.tolist()
    for request, (slot, rows) in enumerate(
        zip(slots[:, 0].tolist(), accepted.tolist(), strict=True)
    ):
        part, kept = slice(bounds[request], bounds[request + 1]), windows[slot]
        before = kept[:, rows - 1 : rows - 2 + width]
        seen = torch.cat([before, mixed_qkv[part].T.to(kept.dtype)], dim=1)
        convolved = F.conv1d(seen[None], weight, layer.conv1d.bias, groups=len(seen))[0]
        out[part] = F.silu(convolved).T.to(out.dtype)
        kept[:, : seen.shape[1] - 1] = seen[:, 1:]
    query, key, value = (x.squeeze(0) for x in layer.rearrange_mixed_qkv(out))
    result: Tensor = ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        q=query,
        k=key,
        v=value,
        a=a,
        b=b,
        initial_state_source=states,
        spec_state_indices=slots.int().contiguous(),
        num_accepted_tokens=accepted.int().contiguous(),
        cu_seqlens=starts.int().contiguous(),
        use_qk_l2norm_in_kernel=True,
    )
    return result
