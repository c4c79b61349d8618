"""How far a target's positions reach, and where its attention begins to depend on a pass.

Source: Transformers' ``modeling_llama4``. Its layers attend within chunks, and its layers without
rotation scale queries by the position in the cache, which is one for all requests of a pass.
"""

from __future__ import annotations

from typing import Any

from dflash_plugin.transformers.rotation import NATIVE_LENGTH, require_length, rotations


def position_limit(config: Any) -> int | None:
    """Positions that a target was made for, with what its rotation is stretched to; None unknown.

    Args:
        config: the target's text configuration.
    """
    declared = getattr(config, "max_position_embeddings", None)
    if not isinstance(declared, int):
        return None
    stretched = [
        int(parameters["factor"] * parameters[NATIVE_LENGTH])
        for parameters in rotations(config)
        if parameters.get("factor") and parameters.get(NATIVE_LENGTH)
    ]
    return max(declared, *stretched, 0)


def has_alibi(config: Any) -> bool:
    """Whether attention biases scores by the distance of keys, which a mask does not carry."""
    of_attention = getattr(config, "attn_config", None)
    flags = (getattr(one, "alibi", False) for one in (config, of_attention))
    return config.model_type == "bloom" or any(flags)


def check_positions(config: Any, max_length: int, rows: int) -> None:
    """Refuse a target whose attention changes within the positions of the engine.

    Args:
        config: the target's text configuration.
        max_length: longest prompt and output.
        rows: of a verify pass, the last of which may reach beyond.

    Raises:
        DFlashError: passes can be longer than the first chunk, or than the positions whose queries
            are not scaled.
    """
    limits = {}
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        limits["attention_chunk_size"] = config.attention_chunk_size
    if getattr(config, "attn_temperature_tuning", None):
        limits["floor_scale"] = config.floor_scale - 1
    for field, limit in limits.items():
        require_length(
            limit,
            max_length,
            rows,
            f"the target {config.model_type!r} has {field} {getattr(config, field)}, and this "
            "engine attends alike at all positions, but",
        )
