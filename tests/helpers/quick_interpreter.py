"""Triton's interpreter without the work that it repeats."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import tl

_patch, _array_type = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
_block_type = tl.block_type.__init__


def turn_on() -> None:
    """Let launches take less than half their time; what they compute stays the same.

    At each launch and each call of a device function Triton looks through its whole language for
    what it has to replace. Here it does so once a function, and leaves it replaced. The shapes that
    it makes and checks for each operation's result are made once.
    """
    interpreter._patch_lang = patched
    interpreter._get_np_dtype = array_type
    tl.block_type.__init__ = of_shape
    tl.tensor.__init__ = of_type


@functools.cache
def patched(function: Any) -> interpreter._LangPatchScope:
    """Replace what a kernel's module has of the language; the scope restores nothing."""
    _patch(function)
    return interpreter._LangPatchScope()


def array_type(of: tl.dtype) -> np.dtype[Any]:
    """NumPy's type for one of Triton's; pointers are not hashable."""
    scalar = of.scalar
    return _array_type(tl.uint64 if scalar.is_ptr() else scalar)


@functools.lru_cache(maxsize=None, typed=True)  # Triton refuses 2.0, which equals 2.
def checked(*shape: int) -> tuple[Any, int, str]:
    """Shape, size and name of blocks, of a shape that Triton accepts."""
    block = object.__new__(tl.block_type)
    _block_type(block, tl.int1, list(shape))
    return block.shape, block.numel, str(block.shape)


def of_shape(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """In place of ``block_type.__init__``."""
    sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
    self.element_ty = element_ty
    self.shape, self.numel, name = checked(*sizes)
    self.name = f"<{name}, {element_ty}>"


@functools.cache
def sizes_of(shape: tuple[int, ...]) -> tuple[Any, tl.constexpr]:
    """A tensor's shape, of constants, and how many elements it has."""
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(int(np.prod(shape)))


def of_type(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """In place of ``tensor.__init__``."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = sizes_of(tuple(type.shape) if type.is_block() else ())
