"""The drafter's linears and head, made of an engine's parallel layers.

The engines' classes have the same names and the same arguments. An adapter passes its classes in,
so that this module imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory
from dflash_plugin.serving.quantised_linears import QuantisedLinears


class QKVShard:
    """Added to an engine's ``QKVParallelLinear``: its keys and values without its queries.

    Attributes:
        plain_method: the engine's method of linears that are not quantized.
    """

    plain_method: ClassVar[type]
    num_heads: int
    head_size: int
    input_size: int
    output_size_per_partition: int
    quant_method: Any
    weight: Tensor
    bias: Tensor | None

    @property
    def query_width(self) -> int:
        """Rows of this shard's weight that make queries; the others make keys, then values."""
        return int(self.num_heads * self.head_size)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a plain matrix, neither quantized nor packed by a platform."""
        shape = self.output_size_per_partition, self.input_size
        return isinstance(self.quant_method, self.plain_method) and (
            tuple(self.weight.shape) == shape
        )

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values [..., 2 * kv_heads * head_dim] of this shard, of x [..., hidden]."""
        if self.is_plain:
            bias = None if self.bias is None else self.bias[self.query_width :]
            return F.linear(x, self.weight[self.query_width :], bias)
        queries_too: Tensor = cast(Any, self)(x)
        return queries_too[..., self.query_width :]


class EngineClasses(NamedTuple):
    """An engine's parallel layers; each linear returns its output alone.

    Attributes:
        qkv: ``QKVParallelLinear`` with a ``QKVShard``.
        column: ``MergedColumnParallelLinear``.
        row: ``RowParallelLinear``.
        replicated: ``ReplicatedLinear``.
        head: ``ParallelLMHead``.
    """

    qkv: Callable[..., Any]
    column: Callable[..., Any]
    row: Callable[..., Any]
    replicated: Callable[..., Any]
    head: Callable[..., Any]


class EngineLayers(LayerFactory):
    """Makes parallel linears, quantized where the engine's configuration says so.

    Args:
        classes: the engine's.
        shards: the tensor-parallel degree.
        quantised: the linears that stay as a quantised checkpoint stores them, or None.
        common: arguments of every linear, such as ``quant_config``.
    """

    def __init__(
        self,
        classes: EngineClasses,
        shards: int,
        quantised: QuantisedLinears | None = None,
        **common: Any,
    ) -> None:
        self.classes, self.shards, self.common = classes, shards, common
        self.quantised = quantised

    def full_name(self, name: str) -> str:
        """The engine's name of a module of the drafter."""
        return name

    def _arguments(self, bias: bool, name: str) -> dict[str, Any]:
        return {"bias": bias, "prefix": self.full_name(name), **self.common}

    def qkv_linear(self, config: DrafterConfig, name: str) -> nn.Module:
        """Sharded by heads."""
        linear: nn.Module = self.classes.qkv(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            **self._arguments(config.attention_bias, name),
        )
        return linear

    def column_linear(
        self, in_features: int, out_features: Sequence[int], bias: bool, name: str
    ) -> nn.Module:
        """Sharded by output."""
        return self._made(
            name,
            lambda common: self.classes.column(
                in_features, list(out_features), **self._arguments(bias, name) | common
            ),
        )

    def row_linear(self, in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
        """Sharded by input, reduced over the shards."""
        return self._made(
            name,
            lambda common: self.classes.row(
                in_features, out_features, **self._arguments(bias, name) | common
            ),
        )

    def _made(self, name: str, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
        """A linear, quantised where the checkpoint and the engine allow it."""
        linear = None
        if self.quantised is not None:
            linear = self.quantised.build(name, lambda config: make({"quant_config": config}))
        return make({}) if linear is None else linear

    def replicated_linear(
        self, in_features: int, out_features: int, bias: bool, name: str
    ) -> nn.Module:
        """Whole on every shard."""
        linear: nn.Module = self.classes.replicated(
            in_features, out_features, **self._arguments(bias, name)
        )
        return linear

    def head(self, rows: int, hidden_size: int, name: str) -> nn.Module:
        """Sharded by vocabulary."""
        head: nn.Module = self.classes.head(rows, hidden_size, prefix=self.full_name(name))
        return head
