"""Settings of other models' layers, which this project's layers do not have.

A file may keep them from the model that it was made of. Where one of them would change the
arithmetic, and no tensor tells whether it does, the file is refused.
"""

from __future__ import annotations

import math
from typing import Any

from dflash_plugin.checkpoints.dialects.fields import Fields, contradiction, is_number
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import OFF, DFlashError

DENSE = "dense"
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "moe",
    "use_moe",
    "enable_moe_block",
)
# Must be this, or left out.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (0,),
    "attention_logit_softcapping": (0,),
    "attn_logit_softcap": (0,),
    "attention_softcap": (0,),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "logits_scaling": (1,),
    "clip_qkv": (0,),
    "alibi": (False,),
    "use_rope": (True,),
    "position_embedding_type": ("rope", "rotary"),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "norm_before_fc": (False,),
    "fc_layernorm": (False,),
    # Blocks of blocks, as DFlare has them.
    "micro_block_size": (),
    "anchor_len": (1,),
}
# Ids of target layers that other programs read.
_OTHER_IDS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
# Other names of settings that are read.
_OTHER_NAMES = {
    "rms_norm_eps": ("norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "rope_theta": ("rope_base", "rotary_base", "rotary_emb_base"),
    "partial_rotary_factor": ("rotary_pct", "rope_pct"),
}


def refuse_experts(fields: Fields) -> None:
    """Refuse layers with a mixture of experts; settings of experts that no layer has are left over.

    Raises:
        DFlashError: names the key that calls for experts.
    """
    count = fields.integer("num_hidden_layers", default=0)
    if _all_dense(fields, count):
        return
    for key in _EXPERTS:
        name, value = fields.find(key)
        if value:
            raise _experts(name, value)
    name, kind = fields.find("draft_ffn_type")
    if kind == "moe":
        raise _experts(name, kind)


def _all_dense(fields: Fields, count: int) -> bool:
    """Whether a file says that none of its layers has experts, by any of three rules.

    Raises:
        DFlashError: it lists other layers.
    """
    name, types = fields.find("mlp_layer_types")
    if types is not None and types != [DENSE] * count:
        raise DFlashError(
            f"{name} is {types!r}: write {DENSE!r} for each of the num_hidden_layers {count} "
            f"layers, others are not supported, {OFF}"
        )
    first, dense = fields.get("first_k_dense_replace"), fields.get("mlp_only_layers")
    return bool(count) and (
        types is not None
        or (is_number(first) and first >= count)
        or (isinstance(dense, list) and all(layer in dense for layer in range(count)))
    )


def refuse_other_heads(fields: Fields, config: DrafterConfig) -> None:
    """Refuse another head than DFlash's, and what was trained on other labels.

    Args:
        fields: of the file.
        config: as it was read from it.

    Raises:
        DFlashError: names the key that calls for it.
    """
    name, projector = fields.find("projector_type")
    if projector not in (None, "dflash", "dflash2" if config.selector else None):
        raise DFlashError(
            f"{name} is {projector!r}: only plain DFlash heads are supported, not Domino or "
            f"DSpark; a DFlash 2 drafter's architecture is 'DFlash2DraftModel'; {OFF}"
        )
    name, shifted = fields.find("shift_label")
    if shifted:
        raise DFlashError(
            f"{name} is {str(shifted).lower()}: drafters trained on shifted labels are not "
            f"supported; {OFF}"
        )


def _experts(name: str, value: Any) -> DFlashError:
    return DFlashError(
        f"{name} is {value!r}, of layers with a mixture of experts, which are not supported: {OFF}"
    )


def refuse_foreign(fields: Fields, config: DrafterConfig) -> None:
    """Refuse settings that nothing reads and that would change what the drafter computes.

    Args:
        fields: of the file.
        config: as it was read from it.

    Raises:
        DFlashError: names the key, its value and what to do.
    """
    for key, plain in _PLAIN.items():
        name, value = fields.find(key)
        if value is not None and value not in plain:
            raise _unread(name, value)
    rope, rotated = config.rope, config.rope_head_dim * config.rope.partial_rotary_factor
    latent = config.latent_attention
    width = config.head_dim if latent is None else latent.qk_head_dim
    needed = {
        "query_pre_attn_scalar": width,
        "qk_head_dim": width,
        "attention_multiplier": config.attention_scale,
        "rotary_dim": int(rotated),
    }
    for key, number in needed.items():
        name, value = fields.find(key)
        fits = is_number(value) and math.isclose(value, number, rel_tol=1e-4)
        if value is not None and not fits:
            raise _unread(name, value)
    name, layers = fields.find("no_rope_layers")
    if layers is not None and not (isinstance(layers, list) and all(layers)):
        raise _unread(name, layers)
    read = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.partial_rotary_factor,
    }
    for known, others in _OTHER_NAMES.items():
        for key in others:
            name, value = fields.find(key)
            if value is not None and value != read[known]:
                raise contradiction(name, value, known, read[known])
    boundaries = [layer + 1 for layer in config.target_layer_ids]
    for key in _OTHER_IDS:
        name, value = fields.find(key)
        if value is not None and value != boundaries:
            raise DFlashError(
                f"{name} is {value!r}, but the target layers that are read are {boundaries} in its "
                "counting, 1 for the first layer's output: correct one of them"
            )


def _unread(name: str, value: Any) -> DFlashError:
    return DFlashError(
        f"{name} is {value!r}, which draft layers are not computed with here: leave it out if the "
        f"drafter was trained without it; {OFF}"
    )
