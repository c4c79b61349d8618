"""vLLM's linears and head, lent to the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.serving.fp8_weights import quantize_engine_drafter, quantized_head


class ShardedQKV(QKVParallelLinear):
    """vLLM's merged query, key and value projection, with keys and values on their own."""

    @property
    def query_width(self) -> int:
        """Rows of this shard that make queries."""
        return int(self.num_heads * self.head_size)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a plain matrix, neither quantized nor packed by a platform."""
        rows = self.output_size_per_partition
        return isinstance(self.quant_method, UnquantizedLinearMethod) and (
            tuple(self.weight.shape) == (rows, self.input_size)
        )

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values of x [..., in], as [..., 2 * kv_heads * head_dim] of this shard."""
        both: Tensor = self(x)
        return both[..., self.query_width :]


def round_to_fp8(drafter: Drafter) -> None:
    """Give a loaded drafter FP8 weights."""
    quantize_engine_drafter(drafter, UnquantizedLinearMethod)


def head_in_fp8(head: nn.Module) -> nn.Module:
    """A copy of a head with an FP8 weight; the head itself where it is quantized already."""
    return quantized_head(head, UnquantizedEmbeddingMethod)


class VllmLayers(LayerFactory):
    """Parallel linears, quantized where the draft model is.

    Args:
        quant_config: the draft model's, or None.
        prefix: of the modules' names; "layers.0" becomes "layers.{first_layer}".
        first_layer: the drafter's layers are numbered behind the target's.
    """

    def __init__(self, quant_config: Any, prefix: str, first_layer: int) -> None:
        self.shards = get_tensor_model_parallel_world_size()
        self.quant_config = quant_config
        self.prefix = prefix
        self.first_layer = first_layer

    def place(self, name: str) -> str:
        """A module's full name in the engine."""
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) + self.first_layer)
        return ".".join([self.prefix, *parts]) if self.prefix else ".".join(parts)

    def _common(self, bias: bool, name: str) -> dict[str, Any]:
        return {
            "bias": bias,
            "quant_config": self.quant_config,
            "prefix": self.place(name),
            "return_bias": False,
        }

    def qkv_linear(self, config: DrafterConfig, name: str) -> nn.Module:
        """Sharded by heads."""
        linear: nn.Module = ShardedQKV(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            **self._common(config.attention_bias, name),
        )
        return linear

    def column_linear(
        self, in_features: int, out_features: Sequence[int], bias: bool, name: str
    ) -> nn.Module:
        """Sharded by output."""
        linear: nn.Module = MergedColumnParallelLinear(
            in_features, list(out_features), **self._common(bias, name)
        )
        return linear

    def row_linear(self, in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
        """Sharded by input, reduced over the shards."""
        linear: nn.Module = RowParallelLinear(in_features, out_features, **self._common(bias, name))
        return linear

    def replicated_linear(
        self, in_features: int, out_features: int, bias: bool, name: str
    ) -> nn.Module:
        """The same on every shard."""
        linear: nn.Module = ReplicatedLinear(in_features, out_features, **self._common(bias, name))
        return linear

    def head(self, rows: int, hidden_size: int, name: str) -> nn.Module:
        """Sharded by vocabulary."""
        head: nn.Module = ParallelLMHead(rows, hidden_size, prefix=self.place(name))
        return head
