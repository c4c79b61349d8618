"""What the dialects share: a Qwen3-style transformer section and the per-layer attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dflash_plugin.checkpoints.dialects.fields import Fields, contradiction
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import OFF, DFlashError

SLIDING, FULL = "sliding_attention", "full_attention"
Shapes = Mapping[str, Sequence[int]]
# What files call the causality of all layers.
CAUSAL = ("is_causal", "causal", "dflash_query_causal")
# Far above any drafter, far below what a list of layers costs.
MOST_LAYERS = 1000


def read_transformer(fields: Fields, shapes: Shapes) -> dict[str, Any]:
    """Sizes and switches of the draft layers."""
    heads = fields.integer("num_attention_heads")
    query_rows = (*shapes.get("layers.0.self_attn.q_proj.weight", ()), 0)[0]
    hidden = fields.integer("hidden_size")
    bias = fields.flag("attention_bias", default=False)
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", default=heads),
        "head_dim": fields.integer("head_dim", default=(query_rows or hidden) // heads or 1),
        "hidden_act": fields.text("hidden_act", "hidden_activation", default="silu"),
        "rms_norm_eps": fields.number("rms_norm_eps", default=1e-6),
        "vocab_size": fields.integer("vocab_size"),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", default=False),
        "qk_norm": fields.flag("qk_norm", "use_qk_norm", default=True),
        "dtype": read_dtype(fields, default="bfloat16"),
    }


def read_dtype(fields: Fields, default: str) -> str:
    """The weights' dtype as the file names it; the tensors decide, so its two names may differ."""
    named = fields.text("dtype", default=fields.text("torch_dtype", default=default))
    return str(named).removeprefix("torch.")


def read_layer_types(fields: Fields) -> list[str]:
    """One of "full_attention" and "sliding_attention" for every draft layer.

    Without ``layer_types``, layers from ``max_window_layers`` on slide if ``use_sliding_window``
    is true, as in Transformers' Qwen3.
    """
    count = fields.integer("num_hidden_layers")
    if count > MOST_LAYERS:
        raise DFlashError(
            f"num_hidden_layers is {count}: a drafter has at most {MOST_LAYERS} layers"
        )
    name, types = fields.find("layer_types")
    if types is None:
        _refuse_other_patterns(fields)
        first = count
        if fields.flag("use_sliding_window", default=False):
            first = fields.integer("max_window_layers", default=28, minimum=0)
        return [FULL if layer < first else SLIDING for layer in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise DFlashError(
            f"{name} is {types!r}: list one type for each of the num_hidden_layers {count} layers"
        )
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise DFlashError(f"{name} has {kind!r}: a draft layer is {FULL!r} or {SLIDING!r}")
    return types


def _refuse_other_patterns(fields: Fields) -> None:
    """Refuse rules for which layers slide that other models have."""
    for key in ("sliding_window_pattern", "_sliding_window_pattern", "attention_chunk_size"):
        name, value = fields.find(key)
        if value:
            raise DFlashError(
                f"{name} is {value!r} and layer_types is missing: list in layer_types which of "
                f"the draft layers are {FULL!r} and which {SLIDING!r}"
            )


def require_layer_types(fields: Fields) -> None:
    """Refuse a window in a file that does not say which layers have it."""
    name, window = fields.find("sliding_window")
    if window is not None and fields.get("layer_types") is None:
        raise DFlashError(
            f"layer_types is missing, but {name} is {window!r}: list the type of each layer, "
            f"{FULL!r} or {SLIDING!r}"
        )


def read_windows(fields: Fields, sliding: Sequence[bool], *names: str) -> list[int | None]:
    """The window of every draft layer; None where it sees all.

    Args:
        fields: of the file.
        sliding: whether each layer has a window.
        names: of the key with the window of all.

    Raises:
        DFlashError: a window is missing, or the windows of the layers contradict that of all.
    """
    per_layer_name, per_layer = fields.find("sliding_windows")
    if per_layer is None:
        window = fields.integer(*names) if any(sliding) else None
        return [window if slides else None for slides in sliding]
    if not isinstance(per_layer, list) or len(per_layer) != len(sliding):
        raise DFlashError(
            f"{per_layer_name} is {per_layer!r}: list one window for each of the "
            f"num_hidden_layers {len(sliding)} layers"
        )
    pairs = list(zip(per_layer, sliding, strict=True))
    used = [window for window, slides in pairs if slides]
    if any(isinstance(window, bool) or not isinstance(window, int) for window in used):
        raise DFlashError(f"{per_layer_name} is {per_layer!r}: give an integer for sliding layers")
    name, window = fields.find(*names)
    if window is not None and any(other != window for other in used):
        raise contradiction(name, window, per_layer_name, per_layer)
    return [window if slides else None for window, slides in pairs]


def require_window_in_use(fields: Fields) -> None:
    """Refuse sliding layers whose window is switched off."""
    name, use = fields.find("use_sliding_window")
    if use is False:
        raise DFlashError(
            f"{name} is False but layer_types has {SLIDING!r}: set it to true, or make the layers "
            f"{FULL!r}"
        )


def own_tensors(shapes: Shapes) -> dict[str, bool]:
    """Which of the optional tensors a checkpoint carries."""
    return {
        "own_embedding": "embed_tokens.weight" in shapes,
        "own_head": "lm_head.weight" in shapes,
        "own_mask_embedding": "mask_embedding" in shapes,
    }


DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


def read_dflash2(fields: Fields) -> dict[str, Any]:
    """Convolution and selector of a DFlash 2 drafter."""
    name, tokens = fields.find("selector_vocab_size")
    if tokens is not None and tokens != fields.integer("vocab_size"):
        raise DFlashError(
            f"{name} is {tokens!r} and vocab_size {fields.integer('vocab_size')}: a selector of "
            f"other tokens than the drafter's is not supported, {OFF}"
        )
    return {
        "convolution": {
            "kernel_size": fields.integer("conv_kernel_size"),
            "group_size": fields.integer("conv_group_size"),
        },
        "selector": {
            "rank": fields.integer("selector_rank"),
            "top_k": fields.integer("selector_top_k", minimum=2),
        },
    }


def refuse_dflash2(fields: Fields, says: str, fix: str) -> None:
    """Refuse the keys of a DFlash 2 drafter in a file that calls it a DFlash one.

    Args:
        fields: of the file.
        says: what in the file does so.
        fix: what to write instead.
    """
    for key in DFLASH2_KEYS:
        name, value = fields.find(key)
        if value is not None:
            raise DFlashError(
                f"{name} is {value!r}, of a DFlash 2 drafter, but {says}: {fix}, or leave the key "
                "out"
            )


def sizes(config: DrafterConfig) -> dict[str, Any]:
    """Model type and sizes of the draft layers, in Transformers' keys."""
    return {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def write_transformer(config: DrafterConfig) -> dict[str, Any]:
    """The Transformers keys that every dialect writes."""
    if config.attention_bias != config.attention_output_bias:
        raise DFlashError(
            f"attention_bias is {config.attention_bias} but attention_output_bias is "
            f"{config.attention_output_bias}: the dialects have one switch for both"
        )
    windows = {layer.sliding_window for layer in config.layers} - {None}
    if len(windows) > 1:
        raise DFlashError(
            f"the layers have different windows {sorted(w for w in windows if w)}: the dialects "
            "have one window for all sliding layers"
        )
    window = next(iter(windows), None)
    written: dict[str, Any] = {
        **sizes(config),
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "layer_types": [SLIDING if layer.sliding_window else FULL for layer in config.layers],
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": len(config.layers),
        "tie_word_embeddings": False,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }
    if config.mlp_bias:
        written["mlp_bias"] = True
    if not config.qk_norm:
        written["qk_norm"] = False
    return written


def of_other_layouts(config: DrafterConfig) -> dict[str, bool]:
    """What only layouts have that are read and not written, with whether the drafter uses it."""
    return {
        "attention_gate": config.attention_gate is not None,
        "norm_per_tap": config.norm_per_tap,
        "norm_context": config.norm_context,
        "last_layer_normed": not config.last_layer_normed,
        "vocab_size": config.vocab_size == 0,
    }


def unsupported(config: DrafterConfig, dialect: str, **needed: bool) -> None:
    """Refuse to write what a dialect has no word for.

    Args:
        config: what is written.
        dialect: where to.
        needed: field names with whether the drafter uses them.
    """
    for name, used in needed.items():
        if used:
            raise DFlashError(
                f"{name} is {getattr(config, name)!r}, which the {dialect} dialect cannot "
                "express: keep the drafter in its own dialect"
            )
