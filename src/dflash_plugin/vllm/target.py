"""The target's model: what a drafter reads and borrows of it."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.interfaces import supports_eagle3

from dflash_plugin.errors import DFlashError
from dflash_plugin.vllm import compat


def require_hidden_states(model_config: Any) -> None:
    """Refuse a target whose layers' outputs vLLM cannot read, before it is loaded.

    Args:
        model_config: the target's ``ModelConfig``.

    Raises:
        DFlashError: its class has no such interface.
    """
    kind = get_model_cls(model_config)
    if not supports_eagle3(kind):
        raise DFlashError(
            f"{kind.__name__} in vLLM {compat.installed()} does not give the outputs of its layers "
            "(SupportsEagle3), which a DFlash drafter reads: serve it without a drafter, or with "
            "SGLang or the Transformers engine"
        )


def target_modules(target: Any) -> tuple[Any, Any]:
    """The embedding and the head of a target model, or None for one that it lacks.

    vLLM's model classes hold them under several names.
    """
    language, inner = _language_model(target)
    embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "embedding", None)
    head = getattr(language, "lm_head", None) or getattr(target, "lm_head", None)
    return embedding, head


def final_norm(target: Any) -> Any:
    """The norm behind a target model's last layer.

    vLLM gives that layer's output before the norm.

    Raises:
        DFlashError: the model has none of that name.
    """
    norm = getattr(_language_model(target)[1], "norm", None)
    if norm is None:
        raise DFlashError(
            f"the drafter reads the output of the target's last layer after the final norm, and "
            f"{type(target).__name__} has no norm: use the Transformers engine, or set "
            "DFLASH_PLUGIN=off to use vLLM's own DFlash"
        )
    return norm


def _language_model(target: Any) -> tuple[Any, Any]:
    """The language model of a target, and its decoder."""
    language = target.get_language_model() if hasattr(target, "get_language_model") else target
    return language, getattr(language, "model", language)
