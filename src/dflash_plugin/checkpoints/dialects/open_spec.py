"""Open Spec Config, the layout that newer speculators releases write (version 0.0.0).

The draft layers' Transformers configuration is the file itself, and ``speculative_config`` says how
they draft. Tensors, causality and windows are those of the speculators dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin.checkpoints.dialects import common, speculators
from dflash_plugin.checkpoints.dialects.fields import Fields, section
from dflash_plugin.errors import OFF, DFlashError

MARK = "open_spec_config_version"
VERSION = "0.0.0"
ARCHITECTURE = "DflashDraftModel"
SPECULATIVE = "speculative_config"
# Drafts of the schema have how a block drafts in here.
NESTED = "dflash_config"
OTHERS = "z-lab's layout, or speculators' own with speculators_model_type 'dflash2'"
# What counts as the first target layer's number.
STARTS = (0, 1)


def read(raw: Mapping[str, Any], shapes: common.Shapes) -> dict[str, Any]:
    """Values of a ``DrafterConfig`` from config.json and the canonical tensors' shapes.

    Raises:
        DFlashError: names the value that is wrong and the fix.
    """
    if raw[MARK] != VERSION:
        raise DFlashError(
            f"{MARK} is {raw[MARK]!r}: only {VERSION!r} is supported, save the drafter in that "
            "version or in speculators' own layout"
        )
    names = raw.get("architectures")
    if names and ARCHITECTURE.lower() not in str(names).lower():
        raise DFlashError(
            f"architectures is {names!r}: an Open Spec Config of a DFlash drafter has "
            f"[{ARCHITECTURE!r}]; {OFF}"
        )
    fields = fields_of(raw)
    method = fields.text("method")
    if method != "dflash":
        raise DFlashError(
            f"{SPECULATIVE}.method is {method!r}: only 'dflash' is supported, give a DFlash "
            f"checkpoint; {OFF}"
        )
    common.refuse_dflash2(fields, f"{SPECULATIVE}.method is {method!r}", f"write it in {OTHERS}")
    said = {name: fields.get(name) for name in speculators.OF_LAYERS}
    given = {name: value for name, value in said.items() if value is not None}
    layer = speculators.with_defaults({**_layers_of(raw), **given}, "config.json")
    inner = Fields(("", layer))
    values = common.read_transformer(inner, shapes)
    shared = speculators.in_both_layouts(fields, inner, layer, shapes)
    vocabulary = fields.integer(
        "draft_vocab_size", default=shapes.get("d2t", (values["vocab_size"],))[0]
    )
    return {
        **values,
        **shared,
        "block_size": _block_size(fields, shared["sample_from_anchor"]),
        "target_layer_ids": _target_layers(fields),
        "draft_vocab_size": None if vocabulary == values["vocab_size"] else vocabulary,
    }


def fields_of(raw: Mapping[str, Any]) -> Fields:
    """The sections of a file."""
    speculative = section(raw, SPECULATIVE)
    # The same drafter in z-lab's words; its layers are counted otherwise.
    other = {name: v for name, v in section(raw, NESTED).items() if name != "target_layer_ids"}
    return Fields(
        (f"{SPECULATIVE}.", speculative),
        (f"{SPECULATIVE}.{NESTED}.", section(speculative, NESTED)),
        (f"{NESTED}.", other),
        ("", _layers_of(raw)),
    )


def _layers_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in (MARK, SPECULATIVE, NESTED)}


def _block_size(fields: Fields, sample_from_anchor: bool) -> int:
    """The block: the drafted tokens, and the anchor where it predicts none."""
    anchor = not sample_from_anchor
    said: int | None = fields.integer("block_size", default=None, minimum=2)
    default = {} if said is None else {"default": said - anchor}
    block: int = fields.integer("speculative_tokens", **default) + anchor
    if said is not None and said != block:
        tokens = f"{SPECULATIVE}.speculative_tokens"
        raise DFlashError(
            f"{fields.find('block_size')[0]} is {said}, but {tokens} {block - anchor} with "
            f"sample_from_anchor {sample_from_anchor} make a block of {block}: correct one of them"
        )
    return block


def _target_layers(fields: Fields) -> tuple[int, ...]:
    start = fields.integer("target_layer_start_idx", minimum=0)
    if start not in STARTS:
        raise DFlashError(
            f"{SPECULATIVE}.target_layer_start_idx is {start}: target layers are counted from 0 "
            "or from 1"
        )
    layers = fields.integers("target_layer_ids")
    if min(layers) < start:
        raise DFlashError(
            f"{SPECULATIVE}.target_layer_ids is {list(layers)}, with a layer before "
            f"target_layer_start_idx {start}: correct one of them"
        )
    return tuple(layer - start for layer in layers)
