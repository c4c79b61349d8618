"""z-lab's dialect and the two that share its file layout, SpecForge and ModelOpt.

Source: PyPI dflash 0.1.0 (``DFlashDraftModel``, ``DFlash2DraftModel``), specforge 0.2.0
(``modeling/draft/dflash.py``), nvidia-modelopt 0.47.0 (``DFlashExporter``); the keys of MiMo, Gemma
and Laguna drafters are those that vLLM 0.33 reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dflash_plugin.checkpoints.dialects import common
from dflash_plugin.checkpoints.dialects.fields import Fields, section
from dflash_plugin.checkpoints.dialects.latent_attention import (
    MLA,
    read_interleaved,
    read_latent_attention,
    write_latent_attention,
)
from dflash_plugin.checkpoints.dialects.rope import OF_ROTATION, read_rope, write_rope
from dflash_plugin.drafter.config import Dialect, DrafterConfig, spread_layers
from dflash_plugin.errors import OFF, DFlashError

DFLASH, DFLASH2 = "DFlashDraftModel", "DFlash2DraftModel"
OPEN_SPEC = "DflashDraftModel"
# What NeMo Automodel calls the same.
OTHER_NAMES = {"Qwen3DFlashDraftModel": DFLASH, "Qwen3DFlash2DraftModel": DFLASH2}


def is_named_dflash(raw: Mapping[str, Any]) -> bool:
    """Whether the architecture, or without one the ``dflash_config``, is a DFlash drafter's."""
    names = raw.get("architectures")
    if not names:
        return isinstance(raw.get("dflash_config"), dict)
    return isinstance(names, list) and not {DFLASH, DFLASH2}.isdisjoint(_architectures(raw))


def _refuse_other_architectures(raw: Mapping[str, Any]) -> None:
    """Refuse drafters that look like DFlash but have other layers or another head."""
    names = _architectures(raw)
    if DFLASH in names or DFLASH2 in names:
        return
    if OPEN_SPEC in names:
        raise DFlashError(
            f"architectures is {names!r}, an Open Spec Config's, but open_spec_config_version is "
            f"missing: add it, or write [{DFLASH!r}] if the file has z-lab's layout; {OFF}"
        )
    raise DFlashError(
        f"architectures is {names!r}, not a DFlash drafter: give a checkpoint whose "
        f"architecture is {DFLASH!r} or {DFLASH2!r}; {OFF}"
    )


def _architectures(raw: Mapping[str, Any]) -> list[Any]:
    names = raw.get("architectures") or [DFLASH]
    if not isinstance(names, list):
        raise DFlashError(f"architectures is {names!r}: give a list like [{DFLASH!r}]")
    return [OTHER_NAMES.get(name, name) if isinstance(name, str) else name for name in names]


def read(raw: Mapping[str, Any], shapes: common.Shapes, dialect: Dialect) -> dict[str, Any]:
    """Values of a ``DrafterConfig``.

    Args:
        raw: config.json.
        shapes: canonical tensor names and shapes.
        dialect: "z-lab", "specforge" or "modelopt"; they differ in what a layer's causality is
            when the file does not say.
    """
    _refuse_other_architectures(raw)
    fields = Fields(("dflash_config.", section(raw, "dflash_config")), ("", raw))
    latent = read_latent_attention(fields)
    values = {**common.read_transformer(fields, shapes), **latent}
    # TorchSpec writes the target's depth by the first name; its second counts the layers read.
    num_target_layers = fields.integer(
        "target_num_hidden_layers", default=fields.integer("num_target_layers", default=None)
    )
    if fields.flag("has_own_lm_head", default=False) and "lm_head.weight" not in shapes:
        raise DFlashError(
            "has_own_lm_head is true but there is no lm_head.weight: add the tensor, or set it to "
            "false where the head is the target's"
        )
    return {
        **values,
        **common.own_tensors(shapes),
        "dialect": dialect,
        "layers": _read_layers(fields, dialect),
        "rope": {
            **read_rope({**raw, **_rope_settings(fields)}, default_theta=None),
            **({"interleaved": read_interleaved(fields)} if latent else {}),
        },
        "norm_style": "gemma" if fields.flag("use_gemma_norm", default=False) else "rms",
        "attention_sinks": fields.flag(
            "attention_sink_bias", "add_swa_attention_sink_bias", default=False
        ),
        "attention_value_scale": fields.number("attention_value_scale", default=None),
        "block_size": _block_size(fields),
        "sample_from_anchor": fields.flag("sample_from_anchor", default=False),
        "mask_token_id": fields.integer("mask_token_id", minimum=0),
        "target_layer_ids": _read_target_layers(fields, num_target_layers),
        "num_target_layers": num_target_layers,
        "target_hidden_size": fields.integer("target_hidden_size", default=values["hidden_size"]),
        "draft_vocab_size": _reduced(fields, values["vocab_size"]),
        "embedding_scale": fields.number("input_embedding_scale", default=None),
        "logit_scale": fields.number("output_multiplier", "logit_scale", default=1.0),
        "logit_softcap": fields.number("final_logit_softcapping", default=None) or None,
        **_read_dflash2(raw, fields),
    }


def _block_size(fields: Fields) -> int:
    if fields.get("block_size") is None:
        raise DFlashError(
            "block_size is missing: ask the engine (inspect: --num-speculative-tokens) for the "
            "number of tokens that the drafter was trained to draft, or add block_size, which is "
            f"one more, to config.json; {OFF}"
        )
    size: int = fields.integer("block_size", minimum=2)
    return size


def _read_dflash2(raw: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Convolution and selector, of a drafter whose architecture has them."""
    names = _architectures(raw)
    if DFLASH2 in names:
        return common.read_dflash2(fields)
    common.refuse_dflash2(fields, f"architectures is {names!r}", f"write [{DFLASH2!r}]")
    return {}


def _rope_settings(fields: Fields) -> dict[str, Any]:
    """What a file says of its rotation, in whichever of its sections.

    Raises:
        DFlashError: two sections say different things.
    """
    found = {name: fields.get(name) for name in OF_ROTATION}
    return {name: value for name, value in found.items() if value is not None}


def _reduced(fields: Fields, vocab_size: int) -> int | None:
    size: int | None = fields.integer("draft_vocab_size", default=None)
    return None if size == vocab_size else size


def _read_layers(fields: Fields, dialect: Dialect) -> list[dict[str, Any]]:
    types = common.read_layer_types(fields)
    use_swa = fields.flag("use_swa", default=False)
    if use_swa and common.SLIDING not in types:
        sliding = [True] * len(types)
    else:
        sliding = [kind == common.SLIDING for kind in types]
    if common.SLIDING in types:
        common.require_window_in_use(fields)
    windows = common.read_windows(fields, sliding, "sliding_window", "swa_window_size")
    causal = fields.flag(*common.CAUSAL, default=None)
    layers = []
    for window, kind in zip(windows, types, strict=True):
        by_type = kind == common.SLIDING and dialect != "specforge"
        layers.append({"sliding_window": window, "causal": by_type if causal is None else causal})
    return layers


def _read_target_layers(fields: Fields, num_target_layers: int | None) -> tuple[int, ...]:
    ids: tuple[int, ...] | None = fields.integers("target_layer_ids", default=None)
    if ids is not None:
        return _layer_outputs(ids, num_target_layers)
    count = fields.integer("num_hidden_layers")
    if num_target_layers is None:
        raise DFlashError(
            "target_layer_ids is missing: add dflash_config.target_layer_ids, the target layers "
            "whose outputs fc reads"
        )
    return spread_layers(num_target_layers, count)


def count_boundaries(ids: Sequence[int], num_target_layers: int | None) -> bool:
    """Whether ids count the boundaries between layers, as ``hidden_states`` does.

    Boundary 0 is the embedding's output and boundary n that of the n-th layer, so ids that reach
    the number of layers cannot count layer outputs from 0.
    """
    return num_target_layers is not None and max(ids) == num_target_layers


def reach(raw: Mapping[str, Any]) -> int | None:
    """``num_target_layers`` of a file whose ids reach it and so count boundaries, else None."""
    fields = Fields(("dflash_config.", section(raw, "dflash_config")), ("", raw))
    ids: tuple[int, ...] | None = fields.integers("target_layer_ids", default=None)
    layers: int | None = fields.integer("num_target_layers", default=None)
    return layers if ids is not None and count_boundaries(ids, layers) else None


def _layer_outputs(ids: tuple[int, ...], num_target_layers: int | None) -> tuple[int, ...]:
    """Ids that count layer outputs from 0.

    Raises:
        DFlashError: ids that count boundaries name the embedding's output, or were written for
            another number of layers.
    """
    if not count_boundaries(ids, num_target_layers):
        return ids
    if min(ids) < 1:
        raise DFlashError(
            f"target layer id {num_target_layers} is out of range where ids count layers from 0, "
            f"and id {min(ids)} is no layer's output where they count boundaries: correct "
            f"target_layer_ids {list(ids)} or num_target_layers {num_target_layers}"
        )
    return tuple(layer - 1 for layer in ids)


def write(config: DrafterConfig, dialect: Dialect) -> dict[str, Any]:
    """config.json of a drafter.

    Raises:
        DFlashError: names the field that the dialect cannot express.
    """
    common.unsupported(
        config,
        dialect,
        window_from=config.window_from != "query"
        and any(layer.sliding_window for layer in config.layers),
        selector=config.selector is not None and dialect != "z-lab",
        latent_attention=config.latent_attention is not None and dialect == "modelopt",
        **common.of_other_layouts(config),
    )
    draft: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    written = {
        "architectures": [DFLASH if config.selector is None else DFLASH2],
        **common.write_transformer(config),
        **write_rope(config.rope),
        **write_latent_attention(config),
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        **_write_causality(config, dialect, draft),
    }
    optional = {
        "target_hidden_size": (config.target_hidden_size, config.hidden_size),
        "draft_vocab_size": (config.draft_vocab_size, None),
        "logit_scale": (config.logit_scale, 1.0),
        "use_gemma_norm": (config.norm_style == "gemma", False),
        "has_own_lm_head": (config.own_head, False),
        "add_swa_attention_sink_bias": (config.attention_sinks, False),
    }
    written.update({name: value for name, (value, plain) in optional.items() if value != plain})
    optional_draft = {
        "sample_from_anchor": (config.sample_from_anchor, False),
        "attention_sink_bias": (config.attention_sinks, False),
        "attention_value_scale": (config.attention_value_scale, None),
        "input_embedding_scale": (config.embedding_scale, None),
        "output_multiplier": (config.logit_scale, 1.0),
        "final_logit_softcapping": (config.logit_softcap, None),
    }
    draft.update({name: value for name, (value, plain) in optional_draft.items() if value != plain})
    if config.convolution is not None and config.selector is not None:
        draft["conv_kernel_size"] = config.convolution.kernel_size
        draft["conv_group_size"] = config.convolution.group_size
        draft["selector_rank"] = config.selector.rank
        draft["selector_top_k"] = config.selector.top_k
    if config.latent_attention is not None:
        draft["attention_mode"] = MLA
        if "is_causal" not in written:
            raise DFlashError(
                "only some layers are causal, which a file with attention_mode 'mla' cannot "
                "express: its readers take one is_causal for all layers"
            )
    written["dflash_config"] = draft
    return written


def _write_causality(
    config: DrafterConfig, dialect: Dialect, draft: dict[str, Any]
) -> dict[str, Any]:
    """Write causality so that every reader of the layout takes it the same way."""
    kinds = {layer.causal for layer in config.layers}
    if dialect == "specforge" and True in kinds:
        raise DFlashError(
            "a layer is causal, which the specforge dialect cannot express: write z-lab instead"
        )
    if len(kinds) == 1:
        causal = next(iter(kinds))
        if dialect == "modelopt":
            draft["causal"] = causal
        return {"is_causal": causal}
    if any(layer.causal != (layer.sliding_window is not None) for layer in config.layers):
        raise DFlashError(
            f"the layers' causality {[layer.causal for layer in config.layers]} follows neither "
            f"one rule nor the layer types: the {dialect} dialect cannot express it"
        )
    if dialect == "modelopt":
        raise DFlashError(
            "only some layers are causal, which the modelopt dialect cannot express: write z-lab"
        )
    return {}
