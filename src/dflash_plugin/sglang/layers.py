"""SGLang's linears and head, lent to the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_world_size
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.serving.fp8_weights import quantize_engine_drafter, quantized_head


class ShardedQKV(QKVParallelLinear):
    """SGLang's merged query, key and value projection, with keys and values on their own."""

    @property
    def query_width(self) -> int:
        """Rows of this shard that make queries."""
        return int(self.num_heads * self.head_size)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a plain matrix."""
        return isinstance(self.quant_method, UnquantizedLinearMethod)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x [..., in]."""
        out: Tensor = super().forward(x)[0]
        return out

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values of x [..., in], as [..., 2 * kv_heads * head_dim] of this shard."""
        if self.is_plain:
            bias = None if self.bias is None else self.bias[self.query_width :]
            return F.linear(x, self.weight[self.query_width :], bias)
        both: Tensor = self(x)
        return both[..., self.query_width :]


def round_to_fp8(drafter: Drafter) -> None:
    """Give a loaded drafter, bound to its target, FP8 weights and an FP8 head."""
    quantize_engine_drafter(drafter, UnquantizedLinearMethod)
    head = quantized_head(drafter.head(), UnquantizedEmbeddingMethod)
    if drafter.own_head is None:
        drafter.replace_borrowed_head(head)
    else:
        drafter.own_head = head


class ShardedColumn(MergedColumnParallelLinear):
    """Returns its output alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out / shards]."""
        out: Tensor = super().forward(x)[0]
        return out


class ShardedRow(RowParallelLinear):
    """Returns its output alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / shards] to [..., out], reduced."""
        out: Tensor = super().forward(x)[0]
        return out


class ReplicatedLayer(ReplicatedLinear):
    """Returns its output alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out: Tensor = super().forward(x)[0]
        return out


class SglangLayers(LayerFactory):
    """Parallel linears, quantized where the draft model is.

    Args:
        quant_config: the draft model's, or None.
    """

    def __init__(self, quant_config: Any) -> None:
        self.shards = get_tensor_model_parallel_world_size()
        self.quant_config = quant_config

    def qkv_linear(self, config: DrafterConfig, name: str) -> nn.Module:
        """Sharded by heads."""
        linear: nn.Module = ShardedQKV(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=self.quant_config,
            prefix=name,
        )
        return linear

    def column_linear(
        self, in_features: int, out_features: Sequence[int], bias: bool, name: str
    ) -> nn.Module:
        """Sharded by output."""
        linear: nn.Module = ShardedColumn(
            in_features, list(out_features), bias=bias, quant_config=self.quant_config, prefix=name
        )
        return linear

    def row_linear(self, in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
        """Sharded by input, reduced over the shards."""
        linear: nn.Module = ShardedRow(
            in_features, out_features, bias=bias, quant_config=self.quant_config, prefix=name
        )
        return linear

    def replicated_linear(
        self, in_features: int, out_features: int, bias: bool, name: str
    ) -> nn.Module:
        """The same on every shard."""
        linear: nn.Module = ReplicatedLayer(
            in_features, out_features, bias=bias, quant_config=self.quant_config, prefix=name
        )
        return linear

    def head(self, rows: int, hidden_size: int, name: str) -> nn.Module:
        """Sharded by vocabulary."""
        head: nn.Module = ParallelLMHead(rows, hidden_size, prefix=name)
        return head
