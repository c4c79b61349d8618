"""Layers with latent attention (MLA), as the z-lab layout says it.

``attention_mode`` of ``dflash_config`` is "mla", and the sizes have the names of Transformers'
DeepSeek V3. Source: SpecForge, pull request 758 (``validate_dflash_mla_config``); vLLM's pull
request 57902 and TokenSpeed (``models/dflash2.py``) read ``lightseekorg/kimi-k3-dflash2`` the same
way. vLLM 0.33 and SGLang 0.5.23 do not read ``attention_mode``.
"""

from __future__ import annotations

from typing import Any

from dflash_plugin.checkpoints.dialects.fields import Fields, contradiction
from dflash_plugin.drafter.config import DrafterConfig, LatentAttentionConfig
from dflash_plugin.errors import OFF, DFlashError

MLA = "mla"
# Grouped-query attention and its kind without groups, which the head counts tell.
PLAIN = ("gqa", "mha")
# What would change the arithmetic of these layers: pull request 758's earlier revisions and NeMo
# Automodel's Kimi K3 drafters have them, no public drafter does.
SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
OTHER_SWITCHES = ("mla_use_output_gate", "mla_use_nope")


def read_latent_attention(fields: Fields) -> dict[str, Any]:
    """Values of a ``DrafterConfig`` that hold in layers with latent attention; else none.

    ``head_dim`` and ``num_key_value_heads`` say nothing of such layers and are not read. With
    ``attention_mode`` "gqa" or "mha" the sizes are not read.

    Raises:
        DFlashError: names the key that is missing, or contradicts another.
    """
    name, modes = fields.find("attention_modes")
    if modes is not None and not (isinstance(modes, list) and all(m in PLAIN for m in modes)):
        raise DFlashError(
            f"{name} is {modes!r}: layers of different attention are not supported, {OFF}"
        )
    name, mode = fields.find("attention_mode")
    if mode in PLAIN:
        return {}
    if mode is None:
        refuse_latent_attention(fields, "set dflash_config.attention_mode to 'mla'")
        return {}
    if mode != MLA:
        raise DFlashError(f"{name} is {mode!r}: the known ones are 'mla', 'gqa' and 'mha'")
    for switch in OTHER_SWITCHES:
        if fields.flag(switch, default=False):
            name = fields.find(switch)[0]
            raise DFlashError(
                f"{name} is true, which is not supported in layers with latent attention (MLA): "
                f"{OFF}"
            )
    missing = next((key for key in SIZES if fields.get(key) is None), None)
    if missing is not None:
        raise DFlashError(
            f"{name} is {mode!r}, but {missing} is missing: add {', '.join(SIZES)} to config.json, "
            "or write 'gqa' for layers with plain attention"
        )
    sizes = LatentAttentionConfig(
        q_lora_rank=fields.integer("q_lora_rank", default=None),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", minimum=0),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    return {
        "latent_attention": sizes,
        "head_dim": sizes.stored_head_dim,
        "num_key_value_heads": fields.integer("num_attention_heads"),
        "qk_norm": fields.flag("qk_norm", "use_qk_norm", default=False),
    }


def refuse_latent_attention(fields: Fields, fix: str) -> None:
    """Refuse sizes of latent attention in a file that does not say that its layers have it.

    Args:
        fields: of the file.
        fix: what to write instead.
    """
    for key in ("kv_lora_rank", "mla", "use_mla"):
        name, value = fields.find(key)
        if not value:
            continue
        raise DFlashError(
            f"{name} is {value!r}, of layers with latent attention (MLA), which the file does not "
            f"call for: {fix}, or leave the key out"
        )


def read_interleaved(fields: Fields) -> bool:
    """Whether the rotation is of neighboring pairs; DeepSeek's is, where the file does not say.

    Raises:
        DFlashError: two keys say different things.
    """
    found: list[tuple[str, Any, bool]] = []
    for key in ("rope_interleave", "mla_rope_interleaved", "is_neox_style", "rope_is_neox_style"):
        value = fields.flag(key, default=None)
        if value is not None:
            found.append((fields.find(key)[0], value, value != key.endswith("neox_style")))
    for name, value, interleaved in found[1:]:
        if interleaved != found[0][2]:
            raise contradiction(found[0][0], found[0][1], name, value)
    return found[0][2] if found else True


def write_latent_attention(config: DrafterConfig) -> dict[str, Any]:
    """Keys of config.json for layers with latent attention."""
    if config.latent_attention is None:
        return {}
    return {
        **config.latent_attention.model_dump(),
        "rope_interleave": config.rope.interleaved,
    }
