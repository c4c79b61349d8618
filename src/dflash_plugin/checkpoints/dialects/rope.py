"""Rotary settings as Transformers writes them: ``rope_parameters``, or the older pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin.checkpoints.dialects.fields import Fields, section
from dflash_plugin.drafter.config import RopeConfig
from dflash_plugin.errors import DFlashError

# Multimodal sections apply to positions with several axes; a drafter's have one.
_IGNORED = {"mrope_section", "mrope_interleaved"}
_NAMED = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def read_rope(
    raw: Mapping[str, Any], default_theta: float | None, prefer: str = "full_attention"
) -> dict[str, Any]:
    """Values of a ``RopeConfig``.

    Args:
        raw: the drafter's Transformers-style configuration.
        default_theta: base where none is given; None makes it an error.
        prefer: which layer type's settings count where they are nested by layer type and equal
            ones are not required by the dialect.

    Raises:
        DFlashError: the settings are malformed.
    """
    parameters = section(raw, "rope_parameters") or section(raw, "rope_scaling")
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if nested:
        distinct = {str(sorted(value.items())) for value in nested.values()}
        if len(distinct) > 1 and prefer not in nested:
            raise DFlashError(
                f"rope_parameters differ between {sorted(nested)}: a drafter has one rotation "
                "for all layers, give one set"
            )
        parameters = nested.get(prefer, next(iter(nested.values())))
    fields = Fields(("rope_parameters.", parameters), ("", raw))
    theta = fields.number("rope_theta", default=default_theta)
    if theta is None:
        raise DFlashError("rope_theta is missing: add the base the drafter was trained with")
    kind = Fields(("rope_parameters.", parameters)).text("rope_type", "type", default="default")
    if kind == "mrope":
        kind = "default"
    rest = {
        name: value
        for name, value in parameters.items()
        if name not in _NAMED | _IGNORED and value is not None
    }
    neox = fields.flag("is_neox_style", "rope_is_neox_style", default=True)
    return {
        "theta": theta,
        "type": kind,
        "parameters": rest,
        "partial_rotary_factor": fields.number("partial_rotary_factor", default=1.0),
        "interleaved": not neox,
        "max_position_embeddings": fields.integer("max_position_embeddings", default=32768),
    }


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The settings in the form that old and new Transformers, vLLM and SGLang read."""
    scaling = None if rope.type == "default" else {"rope_type": rope.type, **rope.parameters}
    written: dict[str, Any] = {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.type, **rope.parameters},
        "max_position_embeddings": rope.max_position_embeddings,
    }
    if rope.partial_rotary_factor != 1.0:
        written["partial_rotary_factor"] = rope.partial_rotary_factor
        written["rope_parameters"]["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.interleaved:
        written["is_neox_style"] = False
    return written
