"""vLLM's linears and head for the drafter."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from dflash_plugin.serving.layers import EngineClasses, EngineLayers, QKVShard
from dflash_plugin.serving.quantised_linears import QuantisedLinears


class ShardedQKV(QKVShard, QKVParallelLinear):
    """vLLM's merged query, key and value projection, with keys and values on their own."""

    plain_method = UnquantizedLinearMethod


CLASSES = EngineClasses(
    ShardedQKV, MergedColumnParallelLinear, RowParallelLinear, ReplicatedLinear, ParallelLMHead
)


class VllmLayers(EngineLayers):
    """vLLM's parallel linears, plain but where the drafter's own checkpoint is quantised.

    Args:
        prefix: of the modules' names.
        first_layer: number of the drafter's first layer, behind the target's layers.
        shards: ranks that share the linears; 1 where each of several ranks has them whole. The
            head is always shared, as the target's is.
        quantised: the linears that stay as a quantised checkpoint stores them, or None.
    """

    def __init__(
        self,
        prefix: str,
        first_layer: int,
        shards: int,
        quantised: QuantisedLinears | None = None,
    ) -> None:
        super().__init__(
            CLASSES,
            shards,
            quantised,
            quant_config=None,
            return_bias=False,
            disable_tp=shards == 1,
        )
        self.prefix, self.first_layer = prefix, first_layer

    def full_name(self, name: str) -> str:
        """The name with prefix and layer number: "layers.0" becomes "layers.{first_layer}"."""
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) + self.first_layer)
        return ".".join([self.prefix, *parts]) if self.prefix else ".".join(parts)


def quant_config(method: str, section: dict[str, Any]) -> Any:
    """vLLM's configuration of a quantisation.

    Args:
        method: vLLM's name.
        section: what a checkpoint's ``quantization_config`` says.
    """
    return get_quantization_config(method).from_config(section)
