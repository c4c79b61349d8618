"""What compressed-tensors itself packs is read as what it itself dequantises, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from dflash_plugin.checkpoints.quantization import dequantise
from dflash_plugin.checkpoints.quantization_config import Declared

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "W4A16 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "W8A16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "W8A16 with zero points": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 with zero points": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "FP8 by tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8 by channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 by block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
}


def by_scale(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The numbers of a weight that share a scale, behind the shape of the scales."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "channel":
        return weight[:, None]
    if args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.view(rows // height, height, columns // width, width)
        return blocks.transpose(1, 2).flatten(-2)
    return weight.view(rows, columns // args.group_size, args.group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SCHEMES)
def test_what_the_library_packs_is_read_as_it_unpacks_it(kind, dtype):
    name, settings = SCHEMES[kind]
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    shared = by_scale(weight, args)
    whole = None
    if name == "nvfp4-pack-quantized":
        whole = (448 * 6 / weight.abs().max().float()).reshape(1)
    scale, zero = calculate_qparams(
        shared.amin(-1), shared.amax(-1), args, **({} if whole is None else {"global_scale": whole})
    )
    plain = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if whole is not None:
        plain["weight_global_scale"] = whole
    library = BaseCompressor.get_value_from_registry(name)
    stored = library.compress(plain, scheme)
    expected = library.decompress(stored, scheme)["weight"]
    named = {f"fc.{part}": tensor for part, tensor in stored.items()}
    block = tuple(args.block_structure or (128, 128))
    found = dequantise(
        {**named, "norm.weight": torch.ones(1, dtype=dtype)},
        Declared(block=block),
        lambda name, rows: [],
    ).tensors["fc.weight"]
    assert found.dtype == dtype
    assert (found - weight).abs().max() < (1.0 if whole is not None else 0.5)
    # The library unpacks FP4 to bfloat16, whatever the others are.
    assert expected.dtype == (torch.bfloat16 if whole is not None else dtype)
    assert torch.equal(found.to(expected.dtype), expected)
