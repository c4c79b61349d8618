"""Tiny targets and drafters for tests: random weights, a few layers, a small vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dflash_plugin.checkpoints.io import expected_tensors, save_checkpoint
from dflash_plugin.checkpoints.tensors import load_tensors
from dflash_plugin.drafter.config import (
    ConvolutionConfig,
    Dialect,
    DrafterConfig,
    LatentAttentionConfig,
    LayerAttention,
    SelectorConfig,
)
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.transformers.loading import bind_drafter

VOCABULARY = 97
# Heads as wide as the engines' CPU attention takes them.
ENGINE_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A Gemma 4 target; its full layers have other heads than those with windows.
GEMMA4: dict[str, Any] = {
    "kind": "gemma4_text",
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 9,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
}
# Own tables of more rows than the target has tokens, the last one the mask's.
PADDED: dict[str, Any] = {
    "vocab_size": 104,
    "mask_token_id": 103,
    "own_embedding": True,
    "own_head": True,
}
# What makes a tiny drafter DFlash 2.
DFLASH2: dict[str, Any] = {
    "convolution": ConvolutionConfig(kernel_size=2, group_size=8),
    "selector": SelectorConfig(rank=6, top_k=5),
}


def latent(sizes: LatentAttentionConfig, heads: int = 4) -> dict[str, Any]:
    """What gives a tiny drafter's layers latent attention."""
    return {
        "latent_attention": sizes,
        "head_dim": sizes.stored_head_dim,
        "num_key_value_heads": heads,
        "qk_norm": False,
    }


def tiny_target(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model whose greedy output wanders instead of repeating one token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    of_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    made_by = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
    return random_weights(made_by.from_config(config, dtype=torch.float32))


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model weights that set its tokens apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def tiny_config(**changes: Any) -> DrafterConfig:
    """A drafter for ``tiny_target``."""
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layers": (LayerAttention(), LayerAttention()),
        "block_size": 4,
        "mask_token_id": 3,
        "target_layer_ids": (0, 2),
        "num_target_layers": 4,
        "target_hidden_size": 32,
        "vocab_size": VOCABULARY,
        "dtype": "float32",
    }
    return DrafterConfig(**{**values, **changes})


def tiny_tensors(config: DrafterConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random canonical tensors; d2t spreads the draft vocabulary over the target's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        if name == "d2t":
            rows = torch.arange(shape[0], device="cpu")
            tensors[name] = rows * (config.vocab_size // shape[0]) - rows
        elif "norm" in name:
            tensors[name] = 1 + 0.1 * torch.randn(shape, generator=generator, device="cpu")
        else:
            # Wide enough that the token before decides between candidates.
            width = 1.0 if "codebook" in name else 0.2
            tensors[name] = width * torch.randn(shape, generator=generator, device="cpu")
    return tensors


def tiny_drafter(target: PreTrainedModel | None = None, seed: int = 0, **changes: Any) -> Drafter:
    """A random drafter, bound to ``target`` if one is given."""
    config = tiny_config(**changes)
    drafter = Drafter(config)
    load_tensors(drafter, tiny_tensors(config, seed))
    if target is not None:
        bind_drafter(drafter, target)
    return drafter.eval()


def write_tiny(directory: Path, dialect: Dialect = "z-lab", seed: int = 0, **changes: Any) -> Path:
    """A tiny drafter checkpoint on disk."""
    config = tiny_config(**changes)
    return save_checkpoint(directory, config, tiny_tensors(config, seed), dialect)


def write_target(directory: Path, kind: str = "llama", **changes: Any) -> Path:
    """A tiny target on disk, with a tokenizer of whole words and a chat template."""
    words = ["<pad>", "<s>", "</s>", "<mask>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<s> {{ message['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    tiny_target(kind, **changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def engine_target(directory: Path) -> PreTrainedModel:
    """A tiny target of the sizes that engines run, on disk too."""
    write_target(directory)
    target = tiny_target(**ENGINE_SIZES)
    target.save_pretrained(directory)
    return target
