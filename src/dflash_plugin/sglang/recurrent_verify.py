"""Verify passes of fewer rows than whole blocks over the gated delta rule.

Where SGLang's metadata lay out such a pass, its kernel of the delta rule follows them: it keeps the
state after each verified row, and the state of the last accepted row is committed as after a pass
of whole blocks. Its convolution takes blocks of one length. ``forward_extend`` therefore spreads
the rows to whole blocks for the convolution and compacts them again behind it. What a cut row
leaves in the convolution's windows is never committed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dflash_plugin.sglang.surface import is_instance

GATED_DELTA_RULE = "GDNAttnBackend"


class Rows(NamedTuple):
    """Where the N rows of a pass stand in B whole blocks of T rows.

    Attributes:
        in_blocks: int64 [N], the row of the whole blocks that each is; of padding any.
        in_pass: int64 [B * T], the row of the pass for each row of the whole blocks; a row that is
            cut has the last verified row of its request.
        are_verified: bool [N], False for padding.
    """

    in_blocks: Tensor
    in_pass: Tensor
    are_verified: Tensor


def rows_of(starts: Tensor, block: int, rows: int) -> Rows:
    """Where the rows of a pass stand in whole blocks; waits for no device.

    Args:
        starts: int32 [B + 1], the first row of each request in the pass, and the end of the last.
            The first request has a row at least, and none has more than ``block``.
        block: T.
        rows: N, of the pass, padding included.
    """
    row = torch.arange(rows, dtype=starts.dtype, device=starts.device)
    owner = torch.searchsorted(starts[1:], row, right=True)
    are_verified = owner < len(starts) - 1
    owner = owner.clamp(max=len(starts) - 2)
    offset = (row - starts[owner]).clamp(max=block - 1)
    step = torch.arange(block, dtype=starts.dtype, device=starts.device)
    in_pass = torch.minimum(starts[:-1, None] + step, starts[1:, None] - 1)
    return Rows(owner * block + offset, in_pass.flatten().long(), are_verified)


def obstacle(backend: Any) -> str | None:
    """What keeps passes over a target's recurrent layers from being cut, and what to do about it.

    Args:
        backend: SGLang's attention back end of a target with recurrent layers.
    """
    layers = _recurrent_part(backend)
    if type(layers).__name__ != GATED_DELTA_RULE:
        name = type(backend if layers is None else layers).__name__
        return f"recurrent layers of {name} take whole blocks only: use another target"
    if layers.req_to_token_pool.mamba_pool.mamba_cache.intermediate_ssm is None:
        return (
            "SGLang replays the target's recurrent states: leave out --enable-linear-replayssm-spec"
        )
    return None


def install(backend: Any) -> bool:
    """Let passes over the recurrent layers of a back end verify other rows than whole blocks.

    Args:
        backend: SGLang's, without an ``obstacle``; one without recurrent layers stays as it is.

    Returns:
        Whether it has recurrent layers.
    """
    layers = _recurrent_part(backend)
    if layers is None:
        return False
    layers.forward_extend = CutPasses(layers).forward_extend
    layers.supports_ragged_verify_graph = True
    return True


def full_attention_of(backend: Any) -> Any:
    """The back end of a target's layers of full attention."""
    return backend if _recurrent_part(backend) is None else backend.full_attn_backend


def _recurrent_part(backend: Any) -> Any:
    return backend.linear_attn_backend if is_instance(backend, "HybridLinearAttnBackend") else None


class CutPasses:
    """The gated delta rule of one back end.

    Args:
        backend: SGLang's ``GDNAttnBackend``.
    """

    def __init__(self, backend: Any) -> None:
        self.backend, self.native = backend, backend.forward_extend
        self.first_layer = min(backend.req_to_token_pool.mamba_map)
        self.rows: Rows | None = None

    def forward_extend(
        self,
        layer: Any,
        forward_batch: Any,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """One layer of a pass, [1, N, heads, dim].

        Args:
            layer: SGLang's ``RadixLinearAttention``.
            forward_batch: of the pass.
            mixed_qkv: [N, width], the convolution's input.
            a, b: [N, heads], of the decay and of the learning rate.
            kwargs: what SGLang's own takes besides.
        """
        verifies = forward_batch.forward_mode.is_target_verify()
        if not verifies or forward_batch.spec_info.ragged_verify_layout is None:
            out: Tensor = self.native(layer, forward_batch, mixed_qkv, a, b, **kwargs)
            return out
        starts = self.backend.forward_metadata.query_start_loc
        block = int(forward_batch.spec_info.draft_token_num)
        if layer.layer_id == self.first_layer:
            # Within a captured pass, so that each replay computes them again.
            self.rows = rows_of(starts, block, len(mixed_qkv))
        assert self.rows is not None
        return self._verify(layer, self.rows, starts, block, mixed_qkv, a, b)

    def _verify(
        self,
        layer: Any,
        rows: Rows,
        starts: Tensor,
        block: int,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        from sglang.srt.layers.attention.linear import gdn_backend

        batch = len(starts) - 1
        states = self.backend.forward_metadata.mamba_cache_indices[:batch]
        scratch = self.backend.verify_intermediate_state_indices[:batch]
        cache = self.backend.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        convolved = gdn_backend.causal_conv1d_update(
            mixed_qkv[rows.in_pass].view(batch, block, -1).transpose(1, 2),
            cache.conv[0],
            layer.conv_weights,
            layer.bias,
            layer.activation,
            conv_state_indices=states,
            intermediate_conv_window=cache.intermediate_conv_window[0],
            intermediate_state_indices=scratch,
        )
        convolved = convolved.transpose(1, 2).reshape(batch * block, -1)[rows.in_blocks]
        query, key, value = (
            part.unflatten(-1, (heads, -1)).contiguous()[None]
            for part, heads in zip(
                convolved.split([layer.q_dim, layer.k_dim, layer.v_dim], dim=-1),
                (layer.num_q_heads, layer.num_k_heads, layer.num_v_heads),
                strict=True,
            )
        )
        # The Triton kernel: FlashInfer's takes blocks of one length.
        out: Tensor = self.backend.kernel_dispatcher.tree_verify_kernel.target_verify(
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            q=query,
            k=key,
            v=value,
            a=a,
            b=b,
            ssm_states=cache.temporal,
            cache_indices=states,
            query_start_loc=starts,
            intermediate_states_buffer=cache.intermediate_ssm,
            intermediate_state_indices=scratch,
            cache_steps=block,
            retrieve_parent_token=None,
        )
        # The kernel leaves rows of padding as they were allocated, which may be no numbers.
        return out.masked_fill(~rows.are_verified[:, None, None], 0)
