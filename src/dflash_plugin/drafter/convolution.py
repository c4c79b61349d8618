"""The convolutions around a DFlash 2 drafter's sublayers: a row sees those before it in its block.

Source: ``GroupedDynamicCausalConv`` of PyPI dflash 0.1.0; https://inco.ai/blog/dflash2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory
from dflash_plugin.kernels.grouped_convolution import convolve_naive


class DynamicConvolution(nn.Module):
    """A convolution of a sublayer's input and one of its output, with kernels from the input.

    It is the identity where ``kernel_projection`` returns zeros, as at the start of training.
    """

    def __init__(self, config: DrafterConfig, factory: LayerFactory, name: str) -> None:
        super().__init__()
        assert config.convolution is not None
        self.taps = config.convolution.kernel_size
        self.groups = config.hidden_size // config.convolution.group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, config.hidden_size))
        self.base_kernel.data[:, 0] = 1.0
        self.kernel_projection = factory.replicated_linear(
            config.hidden_size,
            2 * self.taps * self.groups,
            bias=False,
            name=f"{name}.kernel_projection",
        )

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamic kernels [..., T, taps, groups] of both sides from x [..., T, hidden]."""
        kernels: Tensor = self.kernel_projection(x)
        before, after = kernels.unflatten(-1, (2, self.taps, self.groups)).unbind(-3)
        return before, after

    def forward(
        self, x: Tensor, sublayer: Callable[[Tensor], Tensor], block_size: int | Tensor
    ) -> Tensor:
        """``sublayer`` between the two convolutions.

        Args:
            x: [..., T, hidden], the sublayer's input, normed.
            sublayer: takes and gives [..., T, hidden].
            block_size: rows of a block, as of ``Drafter.run_block``.
        """
        before, after = self.kernels(x)
        x = convolve_naive(x, before, self.base_kernel[0], block_size)
        return convolve_naive(sublayer(x), after, self.base_kernel[1], block_size)
