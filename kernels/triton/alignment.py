"""Streams that the kernels can only read value by value, and the one line that says so.

Triton compiles a kernel for what its arguments are divisible by. A stream that does not start at a
multiple of 16 bytes, or rows of a length that 16 does not divide, give the same results through
accesses of one value each instead of 128 bits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from megatron_mhc.kernels.defaults import DIVISOR

# What callers know the kernels' inputs by; everything else that is long is allocated here.
INPUTS = {
    'x_ptr': 'the streams x',
    'y_ptr': 'the sublayer output y',
    'g_ptr': 'the gradient of the streams',
    'du_ptr': 'the gradient of the sublayer input',
}
# What was said in this process: 'start', 'length'.
SAID: set[str] = set()

logger = logging.getLogger('megatron_mhc.kernels')


class Kernel(Protocol):
    """What we use of a function under ``triton.jit``, compiled or interpreted; hashable."""

    __name__: str
    arg_names: list[str]
    params: list[Any]
    fn: Callable[..., object]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...

    def __hash__(self) -> int: ...


def excess_bytes(tensor: torch.Tensor) -> int:
    """How far behind a multiple of 16 bytes ``tensor`` starts; on meta as it would elsewhere."""
    if tensor.is_meta:
        return int(tensor.storage_offset()) * tensor.element_size() % DIVISOR
    return tensor.data_ptr() % DIVISOR


def say_what_is_slow(kernel: Kernel, arguments: tuple[Any, ...]) -> None:
    """Log once a process each: streams that start badly, and a hidden size that has no 16.

    Args:
        kernel: any; arguments: its run-time values, in that order.
    """
    if len(SAID) == 2:
        return
    inputs, channels = _places(kernel)
    if 'start' not in SAID:
        found = {
            name: excess_bytes(arguments[place])
            for name, place in inputs
            if isinstance(arguments[place], torch.Tensor)
        }
        names = [f'{name} ({excess} bytes)' for name, excess in found.items() if excess]
        if names:
            SAID.add('start')
            _log(
                arguments,
                'the Triton kernels read value by value, which is slower, what starts past a '
                'multiple of 16 bytes: %s; give it memory of its own (.clone()), or start the '
                'view at such a multiple',
                ', '.join(names),
            )
    if channels is not None and 'length' not in SAID and arguments[channels] % DIVISOR:
        SAID.add('length')
        size = arguments[channels]
        _log(
            arguments,
            'the Triton kernels read value by value, which is slower, streams of hidden size %d; '
            'take a multiple of 16, such as %d',
            size,
            -(-size // DIVISOR) * DIVISOR,
        )


@functools.cache
def _places(kernel: Kernel) -> tuple[list[tuple[str, int]], int | None]:
    """Where the inputs and the hidden size stand among the arguments."""
    names = kernel.arg_names
    inputs = [(INPUTS[name], place) for place, name in enumerate(names) if name in INPUTS]
    return inputs, names.index('C') if 'C' in names else None


def _log(arguments: tuple[Any, ...], text: str, *values: object) -> None:
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    # The interpreter on the CPU is for tests: nothing is fast there.
    logger.log(logging.INFO if device.type == 'cpu' else logging.WARNING, text, *values)
