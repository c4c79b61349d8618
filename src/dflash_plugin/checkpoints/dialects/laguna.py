"""Poolside's drafters for Laguna, ``DFlashLagunaForCausalLM``: z-lab's layout with other layers.

Source: what vLLM 0.33 and SGLang 0.5.23 read for this architecture. Beside z-lab's parts a drafter
has a gate on its attention and a norm for every target layer that it reads. Its layers norm context
rows too, and the last target layer is read before the target's final norm, as both engines give
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin.checkpoints.dialects import common, zlab
from dflash_plugin.checkpoints.dialects.fields import Fields, section
from dflash_plugin.errors import OFF, DFlashError

ARCHITECTURE = "DFlashLagunaForCausalLM"
GATES = {True: "per-head", "per-head": "per-head", "per-element": "per-element"}
NO_GATE = (False, "disabled")
DENSE = "dense"
# What the file keeps of the target's experts, where its own layers have none.
OF_EXPERTS = {"num_experts", "num_experts_per_tok", "mlp_layer_types"}


def is_laguna(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a drafter."""
    names = raw.get("architectures")
    return isinstance(names, list) and ARCHITECTURE in names


def read(raw: Mapping[str, Any], shapes: common.Shapes) -> dict[str, Any]:
    """Values of a ``DrafterConfig``.

    Raises:
        DFlashError: names the value that is wrong and the fix.
    """
    fields = Fields(("dflash_config.", section(raw, "dflash_config")), ("", raw))
    _refuse_other_layers(fields)
    dense = fields.get("mlp_layer_types") is not None
    kept = {name: value for name, value in raw.items() if not (dense and name in OF_EXPERTS)}
    plain = {**_with_one_rotation(kept), "architectures": [zlab.DFLASH]}
    return {
        **zlab.read(plain, shapes, "z-lab"),
        "attention_gate": _gate(fields),
        "norm_per_tap": True,
        "norm_context": True,
        "last_layer_normed": False,
    }


def _refuse_other_layers(fields: Fields) -> None:
    """Refuse layers with experts, with heads of their own number, or with sinks."""
    name, types = fields.find("mlp_layer_types")
    if types is not None and (not isinstance(types, list) or set(map(str, types)) != {DENSE}):
        raise DFlashError(
            f"{name} is {types!r}: draft layers with a mixture of experts are not supported, {OFF}"
        )
    heads = fields.integer("num_attention_heads")
    name, per_layer = fields.find("num_attention_heads_per_layer")
    if per_layer is not None and set(map(str, per_layer)) != {str(heads)}:
        raise DFlashError(
            f"{name} is {per_layer!r} and num_attention_heads {heads}: layers with different "
            f"numbers of heads are not supported, {OFF}"
        )
    name, sinks = fields.find("swa_attention_sink_enabled")
    if sinks:
        raise DFlashError(
            f"{name} is {sinks!r}: attention sinks of Laguna layers are not supported, {OFF}"
        )


def _gate(fields: Fields) -> str | None:
    """The kind of gate; one a head where the file does not say, as is Laguna's default."""
    name, value = fields.find("gating")
    if value is None:
        return GATES[True]
    if value in NO_GATE:
        return None
    if not isinstance(value, bool | str) or value not in GATES:
        raise DFlashError(
            f"{name} is {value!r}: write 'per-head', 'per-element' or 'disabled', as the drafter "
            "was trained"
        )
    return GATES[value]


def _with_one_rotation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file with the rotation of its layers in the place where z-lab has it.

    A layer type's own settings count before those of the whole file.
    """
    types = raw.get("layer_types")
    kinds = {str(kind) for kind in types} if isinstance(types, list) else {common.FULL}
    nested = section(raw, "rope_parameters")
    own = nested.get(next(iter(kinds))) if len(kinds) == 1 else None
    if kinds == {common.SLIDING} and raw.get("swa_rope_parameters"):
        own = section(raw, "swa_rope_parameters")
    plain = {name: value for name, value in raw.items() if name != "swa_rope_parameters"}
    if not isinstance(own, dict):
        return plain
    hidden = {"rope_scaling", *(set(own) & {"rope_theta", "partial_rotary_factor"})}
    return {
        **{name: value for name, value in plain.items() if name not in hidden},
        "rope_parameters": own,
    }
