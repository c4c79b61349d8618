"""vLLM's model loader for drafters, which reads checkpoints of any dialect."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader.base_loader import BaseModelLoader


class DrafterLoader(BaseModelLoader):
    """The loader of ``load_format="dflash_plugin"``; ``checkpoints`` reads the files."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to do: the checkpoint was fetched when the engine was configured."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Read the checkpoint into the model's parameters; each takes its own shard."""
        model.load_checkpoint()
