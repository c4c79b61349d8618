"""Targets whose rotation depends on how long the longest sequence of a pass is.

Source: Transformers' ``modeling_rope_utils`` (``dynamic_rope_update``): "dynamic" and "longrope"
choose one set of frequencies for a whole pass. A request beside a longer one would be rotated
otherwise than alone, and its cached keys with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dflash_plugin.errors import DFlashError

KIND, NATIVE_LENGTH = "rope_type", "original_max_position_embeddings"


def check_rotation(config: Any, max_length: int, rows: int) -> None:
    """Refuse a target whose rotation would change within the positions of the engine.

    Args:
        config: the target's text configuration.
        max_length: longest prompt and output.
        rows: of a verify pass, the last of which may reach beyond.

    Raises:
        DFlashError: the frequencies depend on the length of a pass, and passes can be longer than
            what the first set is for.
    """
    for parameters in rotations(config):
        kind = parameters.get(KIND, parameters.get("type"))
        if kind == "longrope":
            limit = parameters.get(NATIVE_LENGTH) or getattr(config, NATIVE_LENGTH, None)
        elif kind == "dynamic":
            limit = None
        else:
            continue
        limit = int(limit or config.max_position_embeddings)
        require_length(
            limit,
            max_length,
            rows,
            f"the target {config.model_type!r} has rope_type {kind!r}, which rotates all requests "
            f"of a pass otherwise once one is longer than {limit} positions, and",
        )


def require_length(limit: int, max_length: int, rows: int, why: str) -> None:
    """Refuse requests beyond a length.

    Args:
        limit: positions that passes may have.
        max_length: longest prompt and output.
        rows: of a verify pass, the last of which may reach beyond.
        why: the beginning of the message.

    Raises:
        DFlashError: passes can be longer.
    """
    if max_length + rows > limit:
        raise DFlashError(
            f"{why} max_length is {max_length}: lower it to {limit - rows} ({rows} rows of a block "
            "may follow), or serve the target with vLLM or SGLang"
        )


def rotations(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rotation of all layers, or that of each layer type."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [part for part in given.values() if isinstance(part, Mapping)]
    yield from nested or [given]
