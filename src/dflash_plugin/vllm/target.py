"""Which targets a drafter can read."""

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
