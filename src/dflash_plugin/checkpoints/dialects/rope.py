"""Rotary settings as Transformers writes them: ``rope_parameters``, or the older pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin.checkpoints.dialects.fields import Fields, contradiction, section
from dflash_plugin.drafter.config import RopeConfig
from dflash_plugin.errors import DFlashError

# Multimodal sections apply to positions with several axes; a drafter's have one.
_IGNORED = {"mrope_section", "mrope_interleaved"}
_NAMED = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
# Bases of layers with windows alone, where others have rope_theta.
_OF_WINDOWS = ("rope_local_base_freq", "swa_rope_theta", "local_rope_theta")
OF_ROTATION = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "is_neox_style",
    "rope_is_neox_style",
    "max_position_embeddings",
    *_OF_WINDOWS,
)


def read_rope(
    raw: Mapping[str, Any], default_theta: float | None, prefer: str | None = None
) -> dict[str, Any]:
    """Values of a ``RopeConfig``.

    Args:
        raw: the drafter's Transformers-style configuration.
        default_theta: base where none is given; None makes it an error.
        prefer: the layer type whose settings count for all layers, where a dialect runs them so
            and they are nested by layer type; None requires those of the drafter's layers to agree.

    Raises:
        DFlashError: the settings are malformed, or contradict each other.
    """
    parameters, place = _of_used_layers(raw, _parameters(raw), prefer), "rope_parameters."
    fields = Fields((place, parameters), ("", raw))
    theta = fields.number("rope_theta", default=default_theta)
    if theta is None:
        raise DFlashError("rope_theta is missing: add the base the drafter was trained with")
    _check_base_of_windows(fields, theta)
    types = {name: parameters.get(name) for name in ("rope_type", "type")}
    plain = {name: "default" if kind == "mrope" else kind for name, kind in types.items()}
    kind = Fields((place, plain)).text("rope_type", "type", default="default")
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


def _of_used_layers(
    raw: Mapping[str, Any], parameters: Mapping[str, Any], prefer: str | None
) -> Mapping[str, Any]:
    """The settings of the drafter's layers, where they are nested by layer type."""
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if not nested:
        return parameters
    types = raw.get("layer_types")
    used = set(types if isinstance(types, list) else ["full_attention"]) & nested.keys()
    chosen = {prefer} if prefer in nested else used or nested.keys()
    distinct = {str(sorted(nested[name].items())) for name in chosen}
    if len(distinct) > 1:
        raise DFlashError(
            f"rope_parameters differ between {sorted(chosen)}: a drafter has one rotation "
            "for all layers, give one set"
        )
    name = min(chosen)
    beside = {key: value for key, value in parameters.items() if key not in nested}
    for key, value in beside.items():
        own = nested[name].get(key)
        if None not in (own, value) and own != value:
            place = f"rope_parameters.{name}.{key}"
            raise contradiction(place, own, f"rope_parameters.{key}", value)
    return {**beside, **nested[name]}


def _check_base_of_windows(fields: Fields, theta: float) -> None:
    """Refuse another base for sliding layers, as a drafter has one rotation for all layers."""
    types = fields.get("layer_types")
    for key in _OF_WINDOWS:
        name, base = fields.find(key)
        slides = not isinstance(types, list) or "sliding_attention" in types
        if base is not None and slides and base != theta:
            raise contradiction(name, base, "rope_theta", theta)


def _parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """``rope_parameters``, or what it was called before.

    Raises:
        DFlashError: both are there and say different things.
    """
    new, old = section(raw, "rope_parameters"), section(raw, "rope_scaling")
    if not new:
        return old
    for name, value in old.items():
        is_type = name in ("type", "rope_type")
        known = "rope_type" if is_type else name
        given = new.get("rope_type", new.get("type", "default")) if is_type else new.get(name)
        if value is not None and given != value:
            raise contradiction(f"rope_parameters.{known}", given, f"rope_scaling.{name}", value)
    return new


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
