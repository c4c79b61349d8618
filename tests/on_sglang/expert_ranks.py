"""SGLang's torch experts on a rank that holds only some of them; by themselves they need all."""

from __future__ import annotations

from typing import Any


def turn_on() -> None:
    """Leave out what other ranks compute."""
    from sglang.srt.layers.moe import fused_moe_native

    native = fused_moe_native.moe_forward_native

    def of_this_rank(layer: Any, x: Any, topk_output: Any, config: Any) -> Any:
        # SGLang marks the experts of other ranks with -1.
        ids, elsewhere = topk_output.topk_ids, topk_output.topk_ids < 0
        weights = topk_output.topk_weights.masked_fill(elsewhere, 0.0)
        mine = topk_output._replace(topk_ids=ids.clamp(min=0), topk_weights=weights)
        return native(layer, x, mine, config)

    fused_moe_native.moe_forward_native = of_this_rank
