"""The dialect of PyPI speculators 0.9.0 (``DFlashSpeculatorConfig``), DFlash 2 included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from dflash_plugin.checkpoints.dialects import common
from dflash_plugin.checkpoints.dialects.fields import Fields, section
from dflash_plugin.checkpoints.dialects.latent_attention import refuse_latent_attention
from dflash_plugin.checkpoints.dialects.rope import OF_ROTATION, read_rope, write_rope
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import OFF, DFlashError, reason

KINDS = ("dflash", "dflash2")
NON_CAUSAL = "sliding_window_non_causal"
INNER, SECOND = "transformer_layer_config", "dflash2_config"
# Some files have these beside the section that they belong to.
OF_LAYERS = (
    "layer_types",
    "sliding_window",
    "sliding_windows",
    "use_sliding_window",
    "max_window_layers",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "vocab_size",
    "attention_bias",
    "mlp_bias",
    "qk_norm",
    "use_qk_norm",
    *OF_ROTATION,
)
# Settings with two names, of which a model type may have filled in the other.
TWO_NAMES = ({"hidden_act", "hidden_activation"}, {"qk_norm", "use_qk_norm"})
# Settings that change what a drafter computes and that these layouts do not have, with the value
# that leaves it as it is.
_OF_OTHER_LAYOUTS = {
    "attention_sink_bias": False,
    "add_swa_attention_sink_bias": False,
    "use_gemma_norm": False,
    "attention_value_scale": 1,
    "output_multiplier": 1,
    "logit_scale": 1,
    "final_logit_softcapping": 0,
}


def read(raw: Mapping[str, Any], shapes: common.Shapes) -> dict[str, Any]:
    """Values of a ``DrafterConfig`` from config.json and the canonical tensors' shapes."""
    kind = raw.get("speculators_model_type")
    if kind not in KINDS:
        raise DFlashError(
            f"speculators_model_type is {kind!r}: only 'dflash' and 'dflash2' are supported, give "
            f"a DFlash checkpoint; {OFF}"
        )
    is_second = kind == "dflash2"
    layer = with_defaults(_with_outer_settings(raw), INNER)
    fields = Fields(("", raw), (f"{SECOND}.", section(raw, SECOND)))
    if not is_second:
        common.refuse_dflash2(fields, f"speculators_model_type is {kind!r}", "write 'dflash2'")
    inner = Fields((f"{INNER}.", layer))
    values = common.read_transformer(inner, shapes)
    values["dtype"] = common.read_dtype(fields, default=values["dtype"])
    draft_vocabulary = fields.integer("draft_vocab_size", default=32000)
    full = draft_vocabulary == values["vocab_size"]
    return {
        **values,
        **in_both_layouts(fields, inner, layer, shapes, non_causal=is_second),
        **(common.read_dflash2(fields) if is_second else {}),
        "block_size": fields.integer("block_size", default=8, minimum=2),
        "target_layer_ids": tuple(i - 1 for i in fields.integers("aux_hidden_state_layer_ids")),
        "draft_vocab_size": None if full else draft_vocabulary,
    }


def suggested_drafts(raw: Mapping[str, Any]) -> int | None:
    """The number of speculative tokens of the first proposal method, or None."""
    try:
        number = raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None
    return number if isinstance(number, int) else None


def in_both_layouts(
    fields: Fields,
    inner: Fields,
    layer: Mapping[str, Any],
    shapes: common.Shapes,
    *,
    non_causal: bool = False,
) -> dict[str, Any]:
    """What speculators' own layout and Open Spec Config say in the same words.

    Args:
        fields: say how the drafter drafts.
        inner: the draft layers' Transformers configuration, with defaults filled in.
        layer: the same where rotation is read from.
        shapes: of the canonical tensors.
        non_causal: what windows are where the file does not say.
    """
    return {
        **common.own_tensors(shapes),
        "dialect": "speculators",
        "layers": _read_layers(fields, inner, non_causal),
        "window_from": "anchor",
        "rope": read_rope(layer, default_theta=10000.0, prefer=common.SLIDING),
        "sample_from_anchor": fields.flag("sample_from_anchor", default=False),
        "mask_token_id": fields.integer("mask_token_id", minimum=0),
        # Its trainer looks up stored rows, of a Gemma target too.
        "embedding_scale": fields.number("input_embedding_scale", default=1.0),
        "target_hidden_size": fields.integer(
            "target_hidden_size", default=inner.integer("hidden_size")
        ),
    }


def refuse_contradictions(fields: Fields, config: DrafterConfig) -> None:
    """Refuse what these layouts do not read, where it says another thing than was read.

    Args:
        fields: all that the file says.
        config: as it was read.

    Raises:
        DFlashError: names the key, its value and what to do.
    """
    refuse_latent_attention(fields, "write the drafter in the z-lab layout")
    for key, plain in _OF_OTHER_LAYOUTS.items():
        name, value = fields.find(key)
        if value is not None and value != plain:
            raise DFlashError(
                f"{name} is {value!r}, which speculators' layouts do not have: leave it out, or "
                "write the drafter in the z-lab layout"
            )
    causal = fields.flag(*common.CAUSAL, default=None)
    if causal is not None and any(layer.causal != causal for layer in config.layers):
        name = fields.find(*common.CAUSAL)[0]
        raise DFlashError(
            f"{name} is {causal}, but speculators' layouts have full layers that are not causal "
            "and sliding ones that are unless sliding_window_non_causal is true: leave it out, or "
            "set sliding_window_non_causal"
        )
    if any(layer.sliding_window for layer in config.layers):
        common.require_window_in_use(fields)


def _with_outer_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The draft layers' configuration, with what the file says of them outside of it.

    Raises:
        DFlashError: inside it says something else.
    """
    layer = section(raw, INNER)
    if not layer:
        return layer
    fields = Fields(("", raw), (f"{INNER}.", layer))
    outside = {name: fields.get(name) for name in OF_LAYERS if raw.get(name) is not None}
    return {**layer, **outside}


def with_defaults(layer: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Fill in what the writer left out because it is the model type's default.

    Args:
        layer: the draft layers' Transformers configuration.
        place: where it stands, for messages.

    Raises:
        DFlashError: there is none, or Transformers refuses it.
    """
    if not layer:
        raise DFlashError(f"{place} is missing: add the draft layers' Transformers configuration")
    kind = layer.get("model_type", "qwen3")
    # Tensors have dtypes of their own.
    apart = ("model_type", "dtype", "torch_dtype")
    try:
        values = {name: value for name, value in layer.items() if name not in apart}
        filled = AutoConfig.for_model(kind, **values).to_dict()
    except Exception as error:  # Transformers raises many kinds here
        raise DFlashError(
            f"{place} with model_type {kind!r} is not valid ({reason(error)}): correct it"
        ) from error
    given = {name: value for name, value in layer.items() if value is not None}
    for names in TWO_NAMES:
        if given.keys() & names:
            filled = {name: value for name, value in filled.items() if name not in names}
    return {**filled, **given}


def _read_layers(fields: Fields, inner: Fields, non_causal: bool) -> list[dict[str, Any]]:
    sliding = [kind == common.SLIDING for kind in common.read_layer_types(inner)]
    causal = not fields.flag(NON_CAUSAL, default=non_causal)
    windows = common.read_windows(inner, sliding, "sliding_window")
    return [
        {"sliding_window": window, "causal": causal and slides}
        for window, slides in zip(windows, sliding, strict=True)
    ]


def write(config: DrafterConfig) -> dict[str, Any]:
    """config.json of a drafter.

    Raises:
        DFlashError: names the field that the dialect cannot express.
    """
    sliding = [layer for layer in config.layers if layer.sliding_window]
    common.unsupported(
        config,
        "speculators",
        window_from=bool(sliding) and config.window_from != "anchor",
        latent_attention=config.latent_attention is not None,
        norm_style=config.norm_style != "rms",
        attention_sinks=config.attention_sinks,
        attention_value_scale=config.attention_value_scale is not None,
        own_mask_embedding=config.own_mask_embedding,
        embedding_scale=config.embedding_scale not in (None, 1.0),
        logit_scale=config.logit_scale != 1.0,
        logit_softcap=config.logit_softcap is not None,
        mlp_bias=config.mlp_bias,
        qk_norm=not config.qk_norm,
        selector=config.selector is not None,
        **common.of_other_layouts(config),
    )
    if any(layer.causal for layer in config.layers if not layer.sliding_window):
        raise DFlashError(
            "a full-attention layer is causal, which the speculators dialect cannot express: "
            "write z-lab instead"
        )
    causal = {layer.causal for layer in sliding}
    if len(causal) > 1:
        raise DFlashError(
            "some sliding layers are causal and some are not, which the speculators dialect "
            "cannot express"
        )
    layer = {**common.write_transformer(config), **write_rope(config.rope)}
    written = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": config.num_draft_tokens,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": None, "architectures": []},
        },
        "transformer_layer_config": layer,
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        NON_CAUSAL: bool(sliding) and not next(iter(causal)),
        "dtype": config.dtype,
    }
    if config.target_hidden_size != config.hidden_size:
        written["target_hidden_size"] = config.target_hidden_size
    return written
