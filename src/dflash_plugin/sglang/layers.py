"""SGLang's linears and head for the drafter."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_world_size
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import Tensor

from dflash_plugin.serving.layers import EngineClasses, EngineLayers, QKVShard
from dflash_plugin.serving.quantised_linears import QuantisedLinears


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
# Whole on every rank; the head stays shared out, as every rank has the same rows for it.
WHOLE = CLASSES._replace(
    qkv=partial(ShardedQKV, tp_rank=0, tp_size=1),
    column=partial(ShardedColumn, tp_rank=0, tp_size=1),
    row=partial(ShardedRow, tp_rank=0, tp_size=1),
)


class SglangLayers(EngineLayers):
    """SGLang's parallel linears, quantized where the draft model is.

    Args:
        quant_config: the draft model's, or None.
        quantised: the linears that stay as a quantised checkpoint stores them, or None.
        whole: every rank holds all of the drafter.
    """

    def __init__(
        self,
        quant_config: Any,
        quantised: QuantisedLinears | None = None,
        *,
        whole: bool = False,
    ) -> None:
        shards = 1 if whole else get_tensor_model_parallel_world_size()
        super().__init__(WHOLE if whole else CLASSES, shards, quantised, quant_config=quant_config)


def quant_config(method: str, section: dict[str, Any]) -> Any:
    """SGLang's configuration of a quantisation.

    Args:
        method: SGLang's name.
        section: what a checkpoint's ``quantization_config`` says.
    """
    return get_quantization_config(method).from_config(section)


def quantisation_obstacle(device: torch.device) -> str | None:
    """Why quantised linears cannot be multiplied on a device, or None."""
    return None if device.type == "cuda" else "SGLang's quantised linears need a GPU"
