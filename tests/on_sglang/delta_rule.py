"""The gated delta rule in torch, where SGLang on a CPU needs a build of its kernels."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def turn_on() -> None:
    """Let this process run targets with gated delta rules; call it before SGLang reads its models.

    SGLang itself imports these by name from a package that is built for a CPU.
    """
    mamba: Any = sys.modules["sgl_kernel.mamba"]
    mamba.causal_conv1d_fn_cpu, mamba.causal_conv1d_update_cpu = convolve, convolve_blocks
    mamba.chunk_gated_delta_rule_cpu = prefill
    operators: Any = torch.ops.sgl_kernel
    operators.fused_gdn_gating_cpu = gates
    operators.fused_rmsnorm_gated_cpu = gated_norm
    operators.fused_sigmoid_gating_delta_rule_update_cpu = update
    operators.fused_qkvzba_split_reshape_cat_contiguous_cpu = split_projections
    operators.fused_qk_gemma_rmsnorm_cpu = None  # Of targets without an output gate.
    operators.fused_qk_gemma_rmsnorm_with_gate_cpu = norm_with_gate
    operators.fused_sigmoid_mul_cpu = lambda x, gate: x.mul_(gate.sigmoid())
    from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.models import qwen2_moe, qwen3_5, qwen3_5_text
    from sglang.srt.models.registry import ModelRegistry

    fused_norm_gate._use_cpu = layernorm_gated._use_cpu = True
    qwen2_moe.fused_gate_sigmoid_mul_add = add_shared_expert
    hybrid_linear_attn_backend.scatter_mamba_states_after_mtp_verify = commit
    # They could not be imported before.
    for module in (qwen3_5, qwen3_5_text):
        ModelRegistry.models.update({model.__name__: model for model in module.EntryClass})


def gated_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(gate)


def split_projections(
    qkvz: Tensor, ba: Tensor, key_heads: int, heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, ...]:
    """The convolution's input, the output gate by head, and what ``gates`` takes."""
    rest = heads * value_dim
    qkv, z = qkvz.split([2 * key_heads * key_dim + rest, rest], dim=1)
    b, a = ba.split(heads, dim=1)
    return qkv.contiguous(), z.reshape(-1, heads, value_dim), b.contiguous(), a.contiguous()


def norm_with_gate(
    q_gate: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    head_dim: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries and keys by head, and the output gate, which stands behind each query."""
    q, gate = q_gate.view(len(q_gate), heads, 2, head_dim).unbind(2)
    q, k = (
        F.rms_norm(x, x.shape[-1:], 1 + weight, eps).contiguous().view(-1, head_dim)
        for x, weight in ((q, q_weight), (k.view(len(k), -1, head_dim), k_weight))
    )
    return q, k, gate.contiguous().view(-1, head_dim)


def add_shared_expert(hidden: Tensor, gate: Tensor, shared: Tensor, out: Tensor) -> None:
    out += (hidden @ gate).sigmoid()[:, None] * shared


def gates(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the decay and the learning rate of each row and head."""
    return (-A_log.exp() * F.softplus(a.float() + dt_bias))[None], b.sigmoid()[None]


def window_of(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A causal convolution of x [D, T], and the last inputs [D, width - 1 + T] it has seen."""
    seen = torch.cat([before, x], dim=1)
    out = F.conv1d(seen[None], weight[:, None], bias, groups=len(x))[0]
    return F.silu(out), seen


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    **_: Any,
) -> Tensor:
    """Of prompts [D, N], one behind the other."""
    out, width = x.clone(), conv_states.shape[-1]
    bounds = query_start_loc.tolist()
    for slot, known, begin, end in zip(
        cache_indices.tolist(), has_initial_state.tolist(), bounds, bounds[1:], strict=False
    ):
        before = conv_states[slot] if known else torch.zeros_like(conv_states[slot])
        out[:, begin:end], seen = window_of(x[:, begin:end], before, weight, bias)
        conv_states[slot] = seen[:, -width:]
    return out


def convolve_blocks(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: Tensor,
    intermediate_conv_window: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Of blocks [B, D, T] or rows [B, D]; keeps what the window holds behind each row."""
    blocks = x if x.dim() == 3 else x[..., None]
    out, width = torch.empty_like(blocks), conv_state.shape[-1]
    for request, slot in enumerate(conv_state_indices.tolist()):
        out[request], seen = window_of(blocks[request], conv_state[slot], weight, bias)
        conv_state[slot] = seen[:, -width:]
        if intermediate_conv_window is not None:
            assert intermediate_state_indices is not None
            kept = intermediate_conv_window[int(intermediate_state_indices[request])]
            for row in range(blocks.shape[2]):
                kept[row] = seen[:, row + 1 : row + 1 + width]
    return out.view(x.shape)


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows [T, value_heads, V] and the state [value_heads, V, K] behind each of them."""
    groups = value.shape[1] // key.shape[1]
    query, key = (
        x.float().repeat_interleave(groups, 1)
        / (x.float().repeat_interleave(groups, 1).square().sum(-1, keepdim=True) + 1e-6).sqrt()
        for x in (query, key)
    )
    rows, states = [], []
    for q, k, v, g, b in zip(query, key, value.float(), log_decay, rate, strict=True):
        state = state * g.exp()[:, None, None]
        error = (v - (state @ k[..., None])[..., 0]) * b[:, None]
        state = state + error[..., None] * k[:, None]
        rows.append((state @ q[..., None])[..., 0] * q.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(rows).to(value.dtype), torch.stack(states)


def prefill(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    **_: Any,
) -> tuple[Tensor, None, None]:
    """Of prompts, one behind the other; leaves their last states in the pool."""
    out, bounds = torch.empty_like(v), cu_seqlens.tolist()
    for slot, begin, end in zip(initial_state_indices.tolist(), bounds, bounds[1:], strict=False):
        part = slice(begin, end)
        parts = (x[0, part] for x in (q, k, v, g, beta))
        out[0, part], states = delta_rule(*parts, initial_state[slot].float())
        initial_state[slot] = states[-1]
    return out, None, None


def update(
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Of few rows of each request; a verify pass keeps the state behind each row instead."""
    log_decay, rate = gates(A_log, a, b, dt_bias)
    out, bounds = torch.full_like(v, torch.nan), cu_seqlens.tolist()
    for request, slot in enumerate(initial_state_indices.tolist()):
        part = slice(bounds[request], bounds[request + 1])
        parts = (x[0, part] for x in (q, k, v, log_decay, rate))
        out[0, part], states = delta_rule(*parts, initial_state_source[slot].float())
        if not disable_state_update:
            initial_state_source[slot] = states[-1]
        if intermediate_states_buffer is not None:
            assert intermediate_state_indices is not None
            kept = intermediate_states_buffer[int(intermediate_state_indices[request])]
            kept[: len(states)] = states
    return out


def commit(caches: Any, slots: Tensor, steps: Tensor, track_slots: Any, track_steps: Any) -> None:
    """Keep the states behind the last accepted rows."""
    assert track_slots is None
    for request, (slot, step) in enumerate(zip(slots.tolist(), steps.tolist(), strict=True)):
        caches.temporal[:, slot] = caches.intermediate_ssm[:, request, step]
        for kept, windows in zip(caches.conv, caches.intermediate_conv_window, strict=True):
            kept[:, slot] = windows[:, request, step]
