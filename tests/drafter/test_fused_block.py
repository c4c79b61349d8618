"""The block pass on fused kernels against the core's, both held against float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin import kernels
from dflash_plugin.drafter import fused_block
from dflash_plugin.drafter.config import ConvolutionConfig, RopeConfig
from dflash_plugin.drafter.fp8_linear import quantize_drafter
from dflash_plugin.drafter.layers import RMSNorm
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.kernels.fp8_rows import takes_rounded
from tests.helpers.kernel_helpers import DEVICE, error, random, values
from tests.helpers.layouts import LAGUNA
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("kernel_device")
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved, gemma, value scale": {
        "rope": RopeConfig(interleaved=True, partial_rotary_factor=0.5),
        "norm_style": "gemma",
        "attention_value_scale": 0.5,
    },
    "no query norm, gelu": {"qk_norm": False, "hidden_act": "gelu"},
    "gate of a head, norms of taps": LAGUNA,
    "gate of a channel, gemma": {**LAGUNA, "attention_gate": "per-element", "norm_style": "gemma"},
    "DFlash 2": DFLASH2,
    "DFlash 2, three taps, gemma": {
        **DFLASH2,
        "convolution": ConvolutionConfig(kernel_size=3, group_size=16),
        "norm_style": "gemma",
    },
}
# Half the distance from 1 to the next float32: what one rounding can lose, relatively.
UNIT = 2.0**-24
# Roundings of a value between two sums: up to six of a convolution with three taps, four of a
# rotation, four of an activation, one of the residual's addition and one of the norm's weight.
BETWEEN = 16


def drafter_of(kind: str) -> Drafter:
    return tiny_drafter(tiny_target(), intermediate_size=48, **BLOCKS[kind]).to(DEVICE)


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Looks only at a row's own key, which keeps these tests about the kernels."""
    weight = (query.unflatten(-2, (2, 2)) * key.unsqueeze(-2)).sum(-1, keepdim=True)
    return (weight.tanh() * value.unsqueeze(-2)).flatten(-3, -2)


def lossy(exact: Drafter) -> Drafter:
    """A float64 copy in which every sum is off by what float32 loses in a sum of its length.

    A sum of n products, in any order, is off by about ``sqrt(n) u`` times the sum of the products'
    magnitudes: n roundings of at most u each, which do not all go one way (Higham and Mary, "A New
    Approach to Probabilistic Rounding Error Analysis", 2019, theorem 2.4 with lambda 1). Every
    linear and norm of the copy is moved by that much, up or down at random, and what follows
    carries it on as it carries on what a float32 pass loses. Real roundings are smaller,
    u / sqrt(3) of partial sums that are smaller too, whatever the order and the number of threads.
    """
    drafter, generator = deepcopy(exact), torch.Generator().manual_seed(0)

    def moved(out: Tensor, terms: int, magnitudes: Tensor) -> Tensor:
        lost = (terms + BETWEEN) ** 0.5 * UNIT
        up = torch.rand(out.shape, generator=generator, device="cpu").to(DEVICE) < 0.5
        return out + torch.where(up, lost, -lost) * magnitudes

    def move_linear(module: nn.Linear, given: tuple[Tensor], out: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.abs()
        return moved(out, module.in_features, F.linear(given[0].abs(), module.weight.abs(), bias))

    def move_norm(module: RMSNorm, given: tuple[Tensor], out: Tensor) -> Tensor:
        return moved(out, len(module.weight), out.abs())

    for module in drafter.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(move_linear)
        elif isinstance(module, RMSNorm):
            module.register_forward_hook(move_norm)
    return drafter


class Passes:
    """One block through a drafter in float64, and how far float32 may be from that."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.embedded, self.features = drafter, random(9, 32), random(9, 64)
        self.positions = torch.arange(9) * 13
        exact = deepcopy(drafter).double()
        self.block, self.context = self._run(exact)
        block, context = self._run(lossy(exact))
        self.block_bound = error(block, self.block)
        self.context_bound = error(context, self.context)

    def _run(self, drafter: Drafter) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            block = drafter.run_block(self.embedded.double(), self.positions, attend)
            return block, drafter.fuse(self.features.double())

    def by_core(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), kernels.forced(False):
            block = self.drafter.run_block(self.embedded, self.positions, attend)
            return block, self.drafter.fuse(self.features)

    def by_kernels(self, rounds: bool = False) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            embedded = self.embedded.clone()
            block = fused_block.run_block(self.drafter, embedded, self.positions, attend)
            return block, values(fused_block.fuse(self.drafter, self.features, rounds))


@pytest.mark.parametrize("kind", BLOCKS)
def test_run_block_is_the_cores(kind: str) -> None:
    passes = Passes(drafter_of(kind))
    for block, context in (passes.by_core(), passes.by_kernels()):
        assert error(block.double(), passes.block) < passes.block_bound
        assert error(context.double(), passes.context) < passes.context_bound


@pytest.mark.parametrize("kind", BLOCKS)
def test_run_block_with_fp8_weights_is_the_cores(kind: str) -> None:
    drafter = drafter_of(kind)
    passes = Passes(drafter)
    quantize_drafter(drafter)
    assert all(takes_rounded(layer.mlp.down_proj) for layer in drafter.layers)
    for out, expected in zip(passes.by_kernels(rounds=True), passes.by_core(), strict=True):
        # A value that falls to its neighbor moves by a sixteenth.
        assert error(out, expected) < 0.05


def narrowed(run: Any) -> Any:
    """A kernel that rounds its result to bfloat16."""
    return lambda *args: run(*args).bfloat16().float()


def without_last_tap(run: Any) -> Any:
    """A convolution that leaves out the row furthest back."""

    def convolve(x: Tensor, weight: Tensor, base: Tensor, *rest: Any) -> Any:
        taps = len(base)
        kernels = weight.clone().unflatten(0, (2, taps, -1))
        kernels[0, -1] = 0.0
        base = base.clone()
        base[-1] = 0.0
        return run(x, kernels.flatten(0, 2), base, *rest)

    return convolve


@pytest.mark.parametrize(
    ("kind", "op", "fault"),
    [
        ("plain", "gated_act", narrowed),
        ("DFlash 2, three taps, gemma", "gated_act", narrowed),
        ("DFlash 2", "projected_convolution", without_last_tap),
        ("DFlash 2, three taps, gemma", "projected_convolution", without_last_tap),
    ],
)
def test_a_faulty_kernel_exceeds_the_bound(kind: str, op: str, fault: Any) -> None:
    """What the bound lets pass is rounding alone."""
    passes = Passes(drafter_of(kind))
    with mock.patch.object(fused_block, op, fault(getattr(fused_block, op))):
        block, _ = passes.by_kernels()
    assert error(block.double(), passes.block) > 5 * passes.block_bound
