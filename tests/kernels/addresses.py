"""Where a kernel reads and writes, found without memory: a recorded launch on made-up addresses.

Loads return zeros and stores do nothing; both note the addresses that their mask lets through. So
offsets of tensors far larger than this machine's memory can be looked at, program by program, with
the integer types that Triton gives them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import mangle_type

from megatron_mhc.kernels.triton.launch import Launch

GAP = 2**44


def touched(launch: Launch, programs: Iterable[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Parameter name -> lowest and highest element that the programs touch.

    Raises:
        AssertionError: an address that belongs to no tensor of the launch.
    """
    names = [name for name in inspect.signature(launch.kernel.fn).parameters]
    names = [name for name in names if name not in launch.constants]
    tensors = dict(zip(names, launch.arguments, strict=True))
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    bases = {name: GAP * index for index, name in enumerate(tensors, 1)}
    arguments = [
        _pointer(value, bases[name]) if name in bases else value
        for name, value in zip(names, launch.arguments, strict=True)
    ]
    seen = {}

    def note(addresses: np.ndarray, mask: np.ndarray) -> None:
        chosen = np.broadcast_to(addresses, mask.shape)[mask.astype(bool)]
        for address in {int(chosen.min()), int(chosen.max())} if chosen.size else ():
            # The nearest tensor, so that an offset below zero is told from one beyond the end.
            index = (address + GAP // 2) // GAP
            assert 1 <= index <= len(bases), f'{launch.name}: address {address:#x}'
            name = list(bases)[index - 1]
            element, rest = divmod(address - bases[name], tensors[name].element_size())
            inside = 0 <= element < tensors[name].numel() and not rest
            assert inside, f'{launch.name}: element {element} of {name}'
            low, high = seen.get(name, (element, element))
            seen[name] = min(low, element), max(high, element)

    for program in programs:
        with _watched(note, program):
            launch.kernel[(1, 1)](*arguments, **launch.constants)
    return seen


def _pointer(tensor: torch.Tensor, base: int) -> tl.tensor:
    kind = tl.str_to_ty(mangle_type(tensor), None)
    return tl.tensor(interpreter.TensorHandle(np.array([base], dtype=np.uint64), kind), kind)


@contextlib.contextmanager
def _watched(note, program: tuple[int, int]) -> Iterator[None]:
    """The interpreter at one program of the grid, with memory out of the way."""
    builder = interpreter.interpreter_builder

    def load(ptrs, mask, other, *_):
        note(ptrs.data, mask.data)
        kind = ptrs.get_element_ty()
        zeros = np.zeros(ptrs.data.shape, dtype=interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(zeros, kind)

    def store(ptrs, value, mask, *_):
        note(ptrs.data, mask.data)

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.set_grid_idx = lambda *_: setattr(builder, 'grid_idx', (*program, 0))
    try:
        # Zeros are divided by zeros here and there; wrapped offsets are found by the caller.
        with np.errstate(all='ignore'):
            yield
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
