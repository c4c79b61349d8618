"""From a checkpoint's tensors to a drafter's modules and back.

Checkpoints name their tensors as z-lab does. The modules merge the projections of queries, keys and
values, and those of gate and up, and have names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dflash_plugin.checkpoints.io import Checkpoint
from dflash_plugin.drafter.interfaces import LayerFactory
from dflash_plugin.drafter.model import Drafter

_CHECKPOINT_PARTS = {
    "context_norm": "hidden_norm",
    "tap_norms": "aux_hidden_norms",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "output_proj": "o_proj",
    "sinks": "attention_sink_bias",
    "own_embedding": "embed_tokens.weight",
    "own_head": "lm_head",
}
_MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def build_drafter(checkpoint: Checkpoint, layers: LayerFactory | None = None) -> Drafter:
    """A drafter with a checkpoint's tensors, in their dtype and on the CPU.

    Args:
        checkpoint: from ``load_checkpoint``.
        layers: makes the linears; plain torch ones when None.
    """
    drafter = Drafter(checkpoint.config, layers)
    drafter.to(checkpoint.tensors["norm.weight"].dtype)
    load_tensors(drafter, checkpoint.tensors)
    return drafter.eval()


def load_tensors(drafter: Drafter, tensors: Mapping[str, Tensor]) -> None:
    """Fill a drafter from tensors under their checkpoint names."""
    drafter.load_state_dict(
        {own: _join(names, tensors) for own, names in checkpoint_names(drafter).items()}
    )


def checkpoint_tensors(drafter: Drafter) -> dict[str, Tensor]:
    """Copies of a drafter's tensors under their checkpoint names."""
    config, state = drafter.config, drafter.state_dict()
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    rows = {2: [inner, inner], 3: [query, kv, kv]}
    tensors: dict[str, Tensor] = {}
    for own, names in checkpoint_names(drafter).items():
        parts = state[own].split(rows[len(names)]) if len(names) > 1 else (state[own],)
        tensors.update({name: part.clone() for name, part in zip(names, parts, strict=True)})
    return tensors


def checkpoint_names(drafter: Drafter) -> dict[str, tuple[str, ...]]:
    """The checkpoint names of each ``state_dict`` entry, in the order of a merged entry's rows."""
    names: dict[str, tuple[str, ...]] = {}
    for own in drafter.state_dict():
        parts = [_CHECKPOINT_PARTS.get(part, part) for part in own.split(".")]
        merged = next((part for part in parts if part in _MERGED), None)
        joined = ".".join(parts).replace(".gate.projection.", ".g_proj.")
        names[own] = (
            tuple(joined.replace(merged, part) for part in _MERGED[merged]) if merged else (joined,)
        )
    return names


def _join(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
