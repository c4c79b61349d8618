"""A quantised checkpoint's linears on an engine's own: ``draft_weights: checkpoint``.

The linears that take most of a layer's bytes stay as the checkpoint stores them. What the adapters
read as plain matrices (queries, keys and values, whose rows of all layers make one product, the
fusion of the target's features, gates and convolutions) is dequantised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.checkpoints.quantization import PARTS
from dflash_plugin.checkpoints.stored_weights import (
    StoredWeights,
    elements,
    fp8_rows,
    stored_weights,
)
from dflash_plugin.drafter.fp8_linear import require_fp8
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.engine_section import engine_section

# The checkpoint's linears by the drafter's.
KEPT = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "o_proj": ("o_proj",),
}
# Activations of four bits lose a tenth; a weight that is read wrongly gives unrelated numbers.
TOLERANCE = 0.3


class _Trial(NamedTuple):
    """Rows, and what a linear makes of them if its weight is dequantised."""

    linear: Any
    rows: Tensor
    expected: Tensor


class QuantisedLinears:
    """The linears that an engine multiplies as the checkpoint stores them.

    Args:
        spec: names the checkpoint.
        stored: its headers.
        quant_config: the engine's, for all of these linears; None keeps no linear.
        obstacle: why there is no ``quant_config``.
        logger: the engine's.

    Attributes:
        linears: those that are kept, by the drafter's names.
    """

    def __init__(
        self,
        spec: DrafterSpec,
        stored: StoredWeights,
        quant_config: Any,
        obstacle: str | None,
        logger: logging.Logger,
    ) -> None:
        self.spec, self.quant_config, self.logger = spec, quant_config, logger
        self.linears: dict[str, Any] = {}
        self._stored = {module: set(parts) for module, parts in stored.modules.items()}
        self._reasons = [] if obstacle is None else [obstacle]
        self._trials: list[_Trial] = []

    def build(self, name: str, make: Callable[[Any], nn.Module]) -> nn.Module | None:
        """A linear of the engine's own quantised kind, or None where it is to be plain.

        Args:
            name: of the linear in the drafter.
            make: gives the linear, of the engine's ``quant_config``.
        """
        modules = _modules(name)
        if len(modules) > 1 and name in self._stored:
            self._note(f"{name.rpartition('.')[2]} is stored in one tensor")
        if self.quant_config is None or not any(module in self._stored for module in modules):
            return None
        try:
            linear = make(self.quant_config)
            self._check_names(linear, modules)
        except Exception as error:  # Engines raise many kinds where they have no kernel.
            self._note(_in_one_line(error))
            return None
        self.linears[name] = linear
        return linear

    def _note(self, why: str) -> None:
        if why not in self._reasons:
            self._reasons.append(why)

    def _check_names(self, linear: nn.Module, modules: tuple[str, ...]) -> None:
        """The engine must want what is stored, and all of the weight."""
        wanted = {name for name, _ in linear.named_parameters() if name != "bias"}
        for module in modules:
            stored = self._stored.get(module, set())
            for part in sorted(wanted - stored):
                raise DFlashError(f"the engine's linear wants {part}, which is not stored")
            for part in sorted((stored & set(PARTS)) - wanted):
                raise DFlashError(f"the engine's linear does not read {part}")

    def tensors(self, plain: Mapping[str, Tensor], rank: int, shards: int) -> dict[str, Tensor]:
        """What is stored of the linears that are kept, by names of the checkpoint.

        Args:
            plain: the dequantised weights, by which ``check`` judges.
            rank: tensor-parallel rank of this shard.
            shards: the tensor-parallel degree.
        """
        stored = stored_weights(self.spec.checkpoint)
        found: dict[str, Tensor] = {}
        kept: set[str] = set()
        for name, linear in self.linears.items():
            modules = _modules(name)
            kept |= set(modules)
            parameters = dict(linear.named_parameters())
            for module in modules:
                for part, tensor in stored.modules[module].items():
                    # An engine's scales of rows have a second dimension.
                    is_column = part in parameters and parameters[part].dim() == tensor.dim() + 1
                    found[f"{module}.{part}"] = tensor[..., None] if is_column else tensor
            # A merged linear is sharded by its parts' rows, the others by columns.
            dim = 0 if len(modules) > 1 else 1
            weights = [plain[f"{module}.weight"].chunk(shards, dim)[rank] for module in modules]
            self._trials.append(_trial(linear, torch.cat(weights)))
        self._log(stored, kept, next(iter(plain.values())).dtype)
        return found

    def _log(self, stored: StoredWeights, kept: set[str], dtype: torch.dtype) -> None:
        if self.linears:
            names = sorted({name.rpartition(".")[2] for name in self.linears})
            self.logger.info(
                "draft weights: %s stay quantised (%s) on the engine's own linears",
                ", ".join(names),
                self.spec.config.quantization,
            )
        reasons = "; ".join(self._reasons) or "this project's kernels read them as plain matrices"
        self.logger.info(
            "draft weights: %d quantised weights are dequantised, %.2f GiB more than they are "
            "stored in: %s",
            len(stored.modules.keys() - kept),
            _growth(stored, kept, dtype),
            reasons,
        )

    def check(self) -> None:
        """Compare what the engine's linears make with what the dequantised weights would.

        Call it when the engine has processed the weights; a second call does nothing.

        Raises:
            DFlashError: a linear makes something else.
        """
        for trial in self._trials:
            device = next(trial.linear.parameters()).device
            rows = trial.rows.to(device)
            with torch.no_grad():
                made = trial.linear.quant_method.apply(trial.linear, rows, None)
            error = (made.float().cpu() - trial.expected).norm() / trial.expected.norm()
            if not error < TOLERANCE:
                name = next(name for name, one in self.linears.items() if one is trial.linear)
                raise DFlashError(
                    f"the engine's quantised linear {name} "
                    f"({type(trial.linear.quant_method).__name__}) is off by {float(error):.0%} of "
                    "what the checkpoint's weights stand for: set draft_weights to 'dequantised'"
                )
        self._trials.clear()


def _in_one_line(error: Exception) -> str:
    """The beginning of an engine's error, which may list all of its kernels."""
    return shorten(str(error), 240, placeholder=" …") or type(error).__name__


def _modules(name: str) -> tuple[str, ...]:
    """The checkpoint's modules of a linear that may be kept; () for the others."""
    layer, _, kind = name.rpartition(".")
    return tuple(f"{layer}.{part}" for part in KEPT.get(kind, ()))


def _trial(linear: nn.Module, weight: Tensor) -> _Trial:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, weight.shape[1], generator=generator).to(weight.dtype)
    return _Trial(linear, rows, F.linear(rows.float(), weight.float().cpu()))


def _growth(stored: StoredWeights, kept: set[str], dtype: torch.dtype) -> float:
    """GiB that the weights that are not kept take beyond what is stored of them."""
    more = 0
    for module, parts in stored.modules.items():
        if module not in kept:
            more += elements(parts) * dtype.itemsize
            more -= sum(tensor.numel() * tensor.dtype.itemsize for tensor in parts.values())
    return more / 2**30


def dequantised_gib(checkpoint: Path, dtype: torch.dtype) -> float:
    """GiB that all quantised weights take, dequantised, beyond what is stored of them.

    Args:
        checkpoint: its directory.
        dtype: of the dequantised weights.
    """
    return _growth(stored_weights(checkpoint, headers_only=True), set(), dtype)


def keeps_stored_rows(spec: DrafterSpec, stored: StoredWeights, device: torch.device) -> bool:
    """Whether FP8 rows of a checkpoint are multiplied as they are stored.

    Args:
        spec: the drafter, with its options.
        stored: its quantised weights.
        device: where it runs.
    """
    asked = spec.options.draft_weights
    if asked == "dequantised" or (asked == "auto" and device.type != "cuda"):
        return False
    # Products of FP8 rows round activations, too.
    if asked == "checkpoint" and not stored.rounds_activations:
        return False
    try:
        require_fp8(device)
    except DFlashError:
        return False
    return True


def quantised_linears(
    spec: DrafterSpec,
    dtype: torch.dtype,
    device: torch.device,
    quant_config: Callable[[str, dict[str, Any]], Any],
    logger: logging.Logger,
    obstacle: str | None = None,
) -> QuantisedLinears | None:
    """The linears to keep as a checkpoint stores them; None where none is asked for.

    Args:
        spec: the drafter, with its options.
        dtype: of its activations.
        device: where it runs.
        quant_config: gives the engine's configuration of a method and its section.
        logger: the engine's.
        obstacle: why this engine can keep none here, or None.
    """
    if spec.options.draft_weights != "checkpoint" or spec.config.quantization is None:
        return None
    stored = stored_weights(spec.checkpoint, headers_only=True)
    if keeps_stored_rows(spec, stored, device):
        rows = fp8_rows(stored)
        modules = {n: p for n, p in stored.modules.items() if f"{n}.weight" not in rows}
        stored = stored._replace(modules=modules)
        if not modules:
            return None
    if obstacle is None and dtype == torch.float32:
        obstacle = "the drafter runs in float32, and quantised linears multiply 16-bit rows"
    config = None
    if obstacle is None:
        try:
            config = quant_config(*engine_section(stored))
        except Exception as error:  # Engines raise many kinds for a section that they do not read.
            obstacle = _in_one_line(error)
    return QuantisedLinears(spec, stored, config, obstacle, logger)
