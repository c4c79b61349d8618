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
from dflash_plugin.checkpoints.dialects.fields import Fields, contradiction, section
from dflash_plugin.errors import OFF, DFlashError

ARCHITECTURE = "DFlashLagunaForCausalLM"
GATES = {True: "per-head", "per-head": "per-head", "per-element": "per-element"}
# Settings of rotation of the whole file.
OF_FILE = ("rope_theta", "partial_rotary_factor", "rope_scaling")
NO_GATE = (False, "disabled")


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
    common.require_layer_types(fields)
    plain = {**_with_one_rotation(raw), "architectures": [zlab.DFLASH]}
    return {
        **zlab.read(plain, shapes, "z-lab"),
        "attention_gate": _gate(fields),
        "norm_per_tap": True,
        "norm_context": True,
        "last_layer_normed": False,
    }


def _refuse_other_layers(fields: Fields) -> None:
    """Refuse layers with heads of their own number, or with sinks."""
    count = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    name, per_layer = fields.find("num_attention_heads_per_layer")
    if per_layer is not None and per_layer != [heads] * count:
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

    Raises:
        DFlashError: sliding layers have two rotations, or another one than full layers.
    """
    types = raw.get("layer_types")
    kinds = {str(kind) for kind in types} if isinstance(types, list) else {common.FULL}
    nested, of_windows = section(raw, "rope_parameters"), section(raw, "swa_rope_parameters")
    own = nested.get(next(iter(kinds))) if len(kinds) == 1 else None
    if common.SLIDING in kinds and of_windows:
        there = own or nested.get(common.SLIDING)
        if len(kinds) > 1:
            there = {**raw, **nested, **section(nested, common.FULL)}
        _check_same_rotation(of_windows, there if isinstance(there, dict) else {}, len(kinds) > 1)
        own = of_windows if len(kinds) == 1 else own
    plain = {name: value for name, value in raw.items() if name != "swa_rope_parameters"}
    if not isinstance(own, dict):
        return plain
    hidden = {name for name in OF_FILE if name in own or name == "rope_scaling"}
    return {
        **{name: value for name, value in plain.items() if name not in hidden},
        "rope_parameters": own,
    }


def own_rotation(raw: Mapping[str, Any]) -> str | None:
    """By which rule a file is read whose layers have a rotation other than the whole file's."""
    kept = _with_one_rotation(raw)
    own = section(kept, "rope_parameters")
    left = [name for name in OF_FILE if raw.get(name) is not None and name not in kept]
    other = [name for name in left if own.get(name) != raw[name]]
    if not other:
        return None
    said = ", ".join(f"{name} {raw[name]!r}" for name in other)
    return f"the draft layers' own rotation {dict(own)} counts before the file's {said}"


def _check_same_rotation(
    of_windows: Mapping[str, Any], others: Mapping[str, Any], every: bool
) -> None:
    """Hold ``swa_rope_parameters`` against what else the file says of rotation.

    Args:
        of_windows: the former.
        others: the latter.
        every: a setting that ``others`` lacks is another one, unless it is the default type.
    """
    for name, value in of_windows.items():
        other = others.get(name)
        missing = every and (name, value) != ("rope_type", "default")
        if other != value and (other is not None or missing):
            raise contradiction(f"swa_rope_parameters.{name}", value, name, other)
