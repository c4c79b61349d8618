"""Fills the hosted drafter from a checkpoint of any dialect."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader.base_loader import BaseModelLoader


class DrafterLoader(BaseModelLoader):
    """vLLM's model loader for ``load_format="dflash_plugin"``; the core reads the files."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to do: the checkpoint was fetched when the engine was configured."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Read the checkpoint into the model's parameters, sharded as they are."""
        model.load_checkpoint()
