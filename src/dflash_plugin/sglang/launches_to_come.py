"""The launches of captured passes, for ``compile_beside``: of the drafter, and of block attention.

Nothing here waits for another rank, so that one rank can launch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from dflash_plugin.drafter import fused_block
from dflash_plugin.kernels.best_logits import best_logits
from dflash_plugin.kernels.draft_attention import Blocks
from dflash_plugin.serving.draft_tokens import first_token
from dflash_plugin.serving.launches_to_come import ROWS, launch_products
from dflash_plugin.sglang import block_attention
from dflash_plugin.sglang.block_attention import FEW_ROWS, BlockAttention
from dflash_plugin.sglang.protocols import ForwardBatchLike, ModelRunnerLike

if TYPE_CHECKING:
    from dflash_plugin.sglang.adaptive import AdaptiveVerifier
    from dflash_plugin.sglang.model import EngineDrafter

# Larger batches have the tiles of these.
MOST_REQUESTS = 256


class Batch(NamedTuple):
    """What ``block_attention.attend`` reads of a pass; SGLang's graphs have the same dtypes.

    Attributes:
        seq_lens: int64 [B].
        req_pool_indices: int64 [B].
        out_cache_loc: int64 [T].
    """

    seq_lens: Tensor
    req_pool_indices: Tensor
    out_cache_loc: Tensor


@torch.no_grad()
def launch_drafter(
    model: EngineDrafter,
    runner: ModelRunnerLike,
    attention: BlockAttention | None,
    rows: Sequence[int],
    size: int,
) -> None:
    """Launch what draft passes and injection launch.

    Args:
        model: bound to its target.
        runner: the drafter's.
        attention: which attention its passes use, None where that is its back end's own.
        rows: of a block, for each length that is drafted.
        size: largest number of requests in a batch.
    """
    launch_products(model)
    if attention is not None:
        for block in rows:
            for requests in batches(size):
                launch_attention(attention, list(model.attentions), requests, requests * block)
    if model.gather is None:
        _launch_pass(model, runner, rows[0])


def _launch_pass(model: EngineDrafter, runner: ModelRunnerLike, block: int) -> None:
    """Launch a pass of one request but for its attention, its head and its injection."""
    config, norm = model.spec.config, model.drafter.norm.weight
    positions = torch.zeros(block, dtype=torch.int64, device=norm.device)
    features = norm.new_empty(block, len(config.target_layer_ids) * config.target_hidden_size)
    model.inject(features, positions, positions, runner.token_to_kv_pool)
    hidden = norm.new_empty(block, norm.shape[0])
    if config.latent_attention is None:
        fused_block.run_block(model.drafter, hidden, positions, _no_attention, block)
    if config.selector is None:
        # Of many rows the head makes logits.
        logits = model.filled_shard_logits(hidden)
        best_logits(logits, 1, first_token=first_token(model.drafter.head()))


def _no_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.no_grad()
def launch_verify_passes(
    attention: BlockAttention, target: Any, verifier: AdaptiveVerifier | None, block: int, size: int
) -> None:
    """Launch the attention of the target's verify passes, whole and cut.

    Args:
        attention: which attention they use.
        target: SGLang's target model.
        verifier: cuts passes; None where none is cut.
        block: rows of a block.
        size: largest number of requests in a batch.
    """
    layers = [layer for layer in target.modules() if type(layer).__name__ == "RadixAttention"]
    for requests in batches(size):
        if attention.takes(requests, requests * block):
            launch_attention(attention, layers, requests, requests * block)
    if verifier is None:
        return
    most = size * block if attention.max_requests is None else min(size * block, FEW_ROWS)
    for rows in ROWS:
        if rows <= most:
            launch_attention(attention, layers, min(rows, size), rows, verifier.graphs.blocks)
    for requests in batches(size):
        row = torch.zeros(requests * (block - 1), device=verifier.device)
        verifier.predictor.predict(row, row)
    verifier.compile_ahead()


def batches(size: int) -> list[int]:
    """Numbers of requests whose passes have every tile that captured ones have, most first.

    Args:
        size: the largest number of requests in a batch.
    """
    size = min(size, MOST_REQUESTS)
    return sorted({size, *(1 << power for power in range(size.bit_length()))}, reverse=True)


def launch_attention(
    attention: BlockAttention,
    layers: Sequence[Any],
    requests: int,
    rows: int,
    blocks: Blocks | None = None,
) -> None:
    """Launch the attention of a pass over each kind of layers.

    Args:
        attention: holds the pool and the table of requests' slots.
        layers: SGLang's ``RadixAttention``.
        requests: of the pass.
        rows: of all requests together.
        blocks: the rows of each request, or None where all have the same number.
    """
    table, dtype = attention.req_to_token, attention.pool.dtype
    numbers = torch.zeros(requests, dtype=torch.int64, device=table.device)
    batch = Batch(numbers, numbers, torch.zeros(rows, dtype=torch.int64, device=table.device))
    kept, attention.blocks = attention.blocks, blocks
    try:
        for layer in _kinds(layers):
            query, key = (
                torch.empty(rows, heads, layer.qk_head_dim, dtype=dtype, device=table.device)
                for heads in (layer.tp_q_head_num, layer.tp_k_head_num)
            )
            block_attention.attend(
                attention, query.flatten(1), key, key, layer, cast(ForwardBatchLike, batch), None
            )
    finally:
        attention.blocks = kept


def _kinds(layers: Sequence[Any]) -> Iterator[Any]:
    """One layer of each kind, as far as kernels tell kinds apart."""
    kinds = {
        (
            layer.tp_q_head_num,
            layer.tp_k_head_num,
            layer.qk_head_dim,
            layer.sliding_window_size,
            str(layer.attn_type.value),
        ): layer
        for layer in reversed(layers)
    }
    yield from kinds.values()
