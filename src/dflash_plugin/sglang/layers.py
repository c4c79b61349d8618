"""SGLang's linears and head for the drafter."""

from __future__ import annotations

from typing import Any

from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_world_size
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import Tensor

from dflash_plugin.serving.layers import EngineClasses, EngineLayers, QKVShard


class ShardedQKV(QKVShard, QKVParallelLinear):
    """SGLang's merged query, key and value projection, with keys and values on their own."""

    plain_method = UnquantizedLinearMethod

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x [..., in], without SGLang's separate bias."""
        out: Tensor = super().forward(x)[0]
        return out


class ShardedColumn(MergedColumnParallelLinear):
    """SGLang's merged linear, without its separate bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out / shards]."""
        out: Tensor = super().forward(x)[0]
        return out


class ShardedRow(RowParallelLinear):
    """SGLang's row-parallel linear, without its separate bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / shards] to [..., out], reduced."""
        out: Tensor = super().forward(x)[0]
        return out


class ReplicatedLayer(ReplicatedLinear):
    """SGLang's linear that every shard holds whole, without its separate bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out: Tensor = super().forward(x)[0]
        return out


CLASSES = EngineClasses(ShardedQKV, ShardedColumn, ShardedRow, ReplicatedLayer, ParallelLMHead)


class SglangLayers(EngineLayers):
    """SGLang's parallel linears, quantized where the draft model is.

    Args:
        quant_config: the draft model's, or None.
    """

    def __init__(self, quant_config: Any) -> None:
        super().__init__(CLASSES, get_tensor_model_parallel_world_size(), quant_config=quant_config)
