"""Repairs of Triton's interpreter, for tests only: how it rounds to bf16, and its speed.

The interpreter keeps bf16 as its bit pattern and cuts the low half of an fp32 off where a GPU
rounds to nearest even. It also computes on the patterns themselves: kernels must widen to fp32
right after a load, and what they compute in bf16 by mistake stays garbage here.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

QUIET = np.uint32(0x0040_0000)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> bit patterns of bf16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # May carry into the exponent, up to infinity, as rounding should.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits = np.where(np.isnan(values), bits | QUIET, rounded)
    return (bits >> np.uint32(16)).astype(np.uint16)


def from_bf16(patterns: np.ndarray) -> np.ndarray:
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def install() -> None:
    """Takes effect once a process; calling it again does nothing."""
    if getattr(interpreter, 'rounds_to_bf16', False):
        return
    interpreter.rounds_to_bf16 = True
    builder = type(interpreter.interpreter_builder)
    for name in ('cast_impl', 'create_fp_to_fp'):
        setattr(builder, name, _exact(getattr(builder, name)))
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _exact(cast: Callable) -> Callable:
    def exact(self, src, dst_type, *others):
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(to_bf16(src.data), target)
        if (source, target) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(from_bf16(src.data), target)
        return cast(self, src, dst_type, *others)

    return exact


def _once_a_launch(patch: Callable) -> Callable:
    """``triton.language`` is made to interpret at each call of a jitted function, most of a run's
    time; what the outermost call has patched holds for those inside."""
    depth = 0

    def once(fn):
        nonlocal depth
        if depth:
            return types.SimpleNamespace(restore=lambda: None)
        # Triton's own jitted functions see `core` where kernels see `tl`.
        scopes = [patch(fn), patch(types.SimpleNamespace(__globals__={'core': tl.core}))]
        # Bounds of a loop, which Triton 3.6 takes from arrays that NumPy 2.5 does not convert.
        scopes[1].set_attr(tl.tensor, '__index__', lambda self: self.handle.data.item())

        def restore():
            nonlocal depth
            depth = 0
            for scope in reversed(scopes):
                scope.restore()

        depth = 1
        return types.SimpleNamespace(restore=restore)

    return once
