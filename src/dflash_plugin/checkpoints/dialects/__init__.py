"""Reading and writing the public checkpoint dialects as one ``DrafterConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from dflash_plugin.checkpoints.dialects import laguna, muse, open_spec, speculators, zlab
from dflash_plugin.checkpoints.dialects.common import CAUSAL, SLIDING, Shapes, read_layer_types
from dflash_plugin.checkpoints.dialects.fields import Fields, section
from dflash_plugin.checkpoints.dialects.foreign import (
    refuse_experts,
    refuse_foreign,
    refuse_other_heads,
)
from dflash_plugin.drafter.config import Dialect, DrafterConfig, build_config
from dflash_plugin.drafter.rope import check_rotation
from dflash_plugin.errors import DFlashError

DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
_SPECFORGE_KEYS = {"projector_type", "pure_draft_prefix_len", "shift_label", "attention_mode"}


def detect(raw: Mapping[str, Any]) -> Dialect:
    """The dialect of a config.json.

    z-lab, SpecForge and ModelOpt share one layout, on which Meta's and Poolside's build: ModelOpt
    always writes ``dflash_config.causal`` and SpecForge has switches that nobody else has. What
    cannot be distinguished reads the same in all three, except sliding layers without
    ``is_causal``; ``is_ambiguous`` detects those.
    """
    if {"speculators_model_type", speculators.INNER, open_spec.MARK} & raw.keys():
        return "speculators"
    if muse.is_muse(raw) or laguna.is_laguna(raw):
        return "z-lab"
    draft = section(raw, "dflash_config")
    if "causal" in draft:
        return "modelopt"
    auto_map = str(raw.get("auto_map") or "")
    if _SPECFORGE_KEYS & set(draft) or "modeling_dflash." in auto_map:
        return "specforge"
    return "z-lab"


def is_dflash(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is a DFlash drafter's, well-formed or not, in a layout that is read."""
    if open_spec.MARK in raw:
        speculative = raw.get(open_spec.SPECULATIVE)
        return isinstance(speculative, dict) and speculative.get("method") == "dflash"
    if "speculators_model_type" in raw:
        return raw["speculators_model_type"] in speculators.KINDS
    return zlab.is_named_dflash(raw) or muse.is_muse(raw) or laguna.is_laguna(raw)


def suggested_drafts(raw: Mapping[str, Any]) -> int | None:
    """The number of speculative tokens that a config.json suggests to engines, if it does."""
    return speculators.suggested_drafts(raw)


def open_spec_verifier(raw: Mapping[str, Any]) -> str | None:
    """The target that an Open Spec Config of a DFlash drafter names, or None."""
    if open_spec.MARK not in raw or not is_dflash(raw):
        return None
    verifier = raw[open_spec.SPECULATIVE].get("verifier")
    return verifier if isinstance(verifier, str) and verifier else None


AMBIGUOUS = (
    "config.json has sliding layers and no is_causal: they are read as causal (z-lab); a SpecForge "
    "export was trained without, read it with --dialect specforge (in an engine, the option "
    "dialect)"
)


def is_ambiguous(raw: Mapping[str, Any]) -> bool:
    """Whether sliding layers leave open which of z-lab and SpecForge wrote them."""
    if muse.is_muse(raw) or laguna.is_laguna(raw):
        return False
    if detect(raw) != "z-lab":
        return False
    fields = _all_fields(raw, "z-lab")
    says = fields.flag(*CAUSAL, default=None) is not None
    return not says and SLIDING in read_layer_types(fields)


def rules_applied(
    raw: Mapping[str, Any], config: DrafterConfig, dialect: Dialect | None = None
) -> dict[str, str]:
    """Rules that settle what a config.json leaves open, by the field that they are about.

    Every program warns of them once.

    Args:
        raw: the parsed file.
        config: as it was read.
        dialect: as given by the user; detected when None.
    """
    found = {}
    if dialect is None and is_ambiguous(raw):
        found["is_causal"] = AMBIGUOUS
    rotation = laguna.own_rotation(raw) if laguna.is_laguna(raw) else None
    if rotation is not None:
        found["rope_parameters"] = rotation
    is_speculators = config.dialect == "speculators"
    windows = [layer for layer in config.layers if layer.sliding_window]
    says = is_speculators and _all_fields(raw, "speculators").get(speculators.NON_CAUSAL)
    if is_speculators and windows and says is None:
        kind = "causal" if windows[0].causal else "not causal"
        found[speculators.NON_CAUSAL] = (
            f"config.json has sliding layers and no {speculators.NON_CAUSAL}: they are read as "
            f"{kind}, speculators' default for this kind of drafter; write the key if they were "
            "trained otherwise"
        )
    layers = None if is_speculators else zlab.reach(raw)
    if layers is not None:
        found["num_target_layers"] = (
            f"target_layer_ids reach num_target_layers {layers}: they are read as boundaries, as "
            "hidden_states counts them (0 is the embedding's output, n that of the n-th layer); "
            "correct num_target_layers if they count layers from 0"
        )
    return found


def with_block(raw: Mapping[str, Any], drafts: int | None) -> Mapping[str, Any]:
    """A config.json with a block where it names none, as vLLM runs such a drafter.

    Only files in z-lab's layout may leave the block open.

    Args:
        raw: the parsed file.
        drafts: tokens that a block drafts; None leaves the file as it is.
    """
    if not isinstance(drafts, int) or detect(raw) == "speculators":
        return raw
    fields = _all_fields(raw, "z-lab")
    if fields.get("block_size") is not None:
        return raw
    anchor = not fields.flag("sample_from_anchor", default=False)
    return {**raw, "block_size": drafts + anchor}


def read_config(
    raw: Mapping[str, Any], shapes: Shapes, dialect: Dialect | None = None
) -> DrafterConfig:
    """Understand a config.json.

    Args:
        raw: the parsed file.
        shapes: canonical names and shapes of the checkpoint's tensors.
        dialect: the dialect; detected when None.

    Raises:
        DFlashError: names the value that is wrong and the fix.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise DFlashError(f"dialect is {dialect!r}: choose one of {', '.join(DIALECTS)}")
    dialect = dialect or detect(raw)
    fields = _all_fields(raw, dialect)
    refuse_experts(fields)
    config = build_config(_read(raw, shapes, dialect))
    check_rotation(config)
    refuse_other_heads(fields, config)
    refuse_foreign(fields, config)
    if dialect == "speculators":
        speculators.refuse_contradictions(fields, config)
    return config


def _read(raw: Mapping[str, Any], shapes: Shapes, dialect: Dialect) -> dict[str, Any]:
    if dialect == "speculators" and open_spec.MARK in raw:
        return open_spec.read(raw, shapes)
    if dialect == "speculators":
        return speculators.read(raw, shapes)
    if dialect == "z-lab" and muse.is_muse(raw):
        return muse.read(raw, shapes)
    if dialect == "z-lab" and laguna.is_laguna(raw):
        return laguna.read(raw, shapes)
    return zlab.read(raw, shapes, dialect)


def _all_fields(raw: Mapping[str, Any], dialect: Dialect) -> Fields:
    """Every section of a file in which the settings of draft layers may stand."""
    if dialect != "speculators":
        return Fields(("dflash_config.", section(raw, "dflash_config")), ("", raw))
    if open_spec.MARK in raw:
        return open_spec.fields_of(raw)
    return Fields(("", raw), (f"{speculators.INNER}.", section(raw, speculators.INNER)))


def write_config(config: DrafterConfig, dialect: Dialect) -> dict[str, Any]:
    """config.json of a drafter in a dialect.

    Raises:
        DFlashError: names the field that the dialect cannot express.
    """
    if dialect not in DIALECTS:
        raise DFlashError(f"dialect is {dialect!r}: choose one of {', '.join(DIALECTS)}")
    if dialect == "speculators":
        return speculators.write(config)
    return zlab.write(config, dialect)
