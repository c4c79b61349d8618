"""What the quick interpreter puts in place of Triton's own does the same."""

from __future__ import annotations

import re

import pytest
import torch

from dflash_plugin.kernels.language import tl
from tests.helpers import quick_interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
TRITONS = quick_interpreter._block_type


def by_triton(element_type: tl.dtype, shape: list[int]) -> tl.block_type:
    made = object.__new__(tl.block_type)
    TRITONS(made, element_type, shape)
    return made


def test_it_is_on():
    assert tl.block_type.__init__ is not TRITONS


@pytest.mark.parametrize("element_type", [tl.float16, tl.pointer_type(tl.int32)], ids=str)
@pytest.mark.parametrize("shape", [[4], [2, 8], [1, 1, 16]], ids=str)
def test_types_and_shapes_are_tritons(element_type, shape):
    made, expected = tl.block_type(element_type, shape), by_triton(element_type, shape)
    assert made == expected
    assert (made.name, made.numel) == (expected.name, expected.numel)
    assert [*made.shape] == [*expected.shape] == shape
    tensor = tl.tensor(None, made)
    assert [size.value for size in tensor.shape] == shape
    assert tensor.numel.value == made.numel
    assert tensor.dtype == element_type


@pytest.mark.parametrize("shape", [[], [3], [2, 6], [2.0, 8], [1 << 21]], ids=str)
def test_what_triton_refuses_is_refused(shape):
    tl.block_type(tl.float16, [2, 8])
    with pytest.raises((TypeError, ValueError)) as expected:
        by_triton(tl.float16, shape)
    for _ in range(2):
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            tl.block_type(tl.float16, shape)
