"""The launches of a drafter's products, for ``compile_beside``."""

from __future__ import annotations

import torch

from dflash_plugin.drafter.fp8_linear import linear
from dflash_plugin.kernels.fp8_rows import Fp8Rows
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin
from dflash_plugin.serving.fp8_weights import is_rounded, rounded_linears, rows_of

# Of passes, most first as engines capture: a kernel for each has another tile.
ROWS = (256, 128, 64, 32, 16)


@torch.no_grad()
def launch_products(model: EngineDrafterMixin) -> None:
    """Launch the head's and the FP8 linears' products of a drafter, with every tile.

    No rank waits for another here.

    Args:
        model: its weights are prepared.
    """
    norm = model.drafter.norm.weight
    weights = [rows_of(one) for _, one in rounded_linears(model.drafter) if is_rounded(one)]
    if isinstance(model.context_weight, Fp8Rows):
        weights.append(model.context_weight)
    by_shape = {weight.values.shape: weight for weight in weights}
    for rows in ROWS:
        if model.spec.config.selector is None:
            model.shard_choice(norm.new_empty(rows, norm.shape[0]))
        for (_, width), weight in by_shape.items():
            linear(norm.new_empty(rows, width), weight)
