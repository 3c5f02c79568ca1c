"""The one place where a Triton kernel is started.

Under ``record_launches`` nothing runs: the launches are kept instead. On meta tensors this tells
what a call would start, with the shipped tile sizes, without a GPU and without memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from megatron_mhc.kernels.triton.alignment import Kernel, say_what_is_slow

# A thread can have so many; as a cap it keeps the assembler from squeezing.
MOST_REGISTERS = 255
# Programs that fill the largest GPU; the SMs of H100 and H200; and what the start of a program and
# its partial sum cost, in blocks.
PROGRAMS, SMS, ENDS = 512, 132, 4
# So many shapes of one process are decided upon once: choices follow from shapes alone.
SHAPES = 1024
_RECORD: ContextVar[list[Launch] | None] = ContextVar('megatron_mhc_launches', default=None)


@dataclass(frozen=True)
class Tile:
    """The block that one program works on, and the warps that share it.

    ``registers`` is the most that a thread may take. Without it the assembler squeezes a kernel
    that needs a few more registers than the next step of occupancy has, and may spill for that;
    255 is all that a thread can have.
    """

    tokens: int
    channels: int = 0
    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """What the compiler is told of it."""
        cap = {} if self.registers is None else {'maxnreg': self.registers}
        # Fusion is said, because Triton's default changes: stored streams must not depend on it.
        return {
            'num_warps': self.num_warps,
            'num_stages': self.num_stages,
            'enable_fp_fusion': True,
            **cap,
        }


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that determines its code and its memory traffic.

    ``arguments`` are the run-time values in the order of the kernel's parameters (tensors, numbers,
    or None for an absent tensor), ``constants`` its ``tl.constexpr`` parameters.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [value for value in self.arguments if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches in the yielded list instead of running them."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def interpreted() -> bool:
    """Whether Triton runs kernels as Python on the CPU (``TRITON_INTERPRET=1`` at its import)."""
    return bool(triton.knobs.runtime.interpret)


def launch(
    kernel: Kernel, grid: tuple[int, ...], *arguments: object, tile: Tile, **constants: object
) -> None:
    """Run ``kernel`` on the device of its tensors; nothing is read back."""
    record = _RECORD.get()
    if record is not None:
        record.append(Launch(kernel, grid, arguments, constants, tile.options))
        return
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    say_what_is_slow(kernel, arguments)
    guard = torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()
    with guard:
        kernel[grid](*arguments, **constants, **tile.options)


@functools.lru_cache(SHAPES)
def fitted(tile: Tile, channels: int) -> Tile:
    """``tile``, no wider than ``channels`` need.

    Masked tails take more registers than full tiles: a cap that was chosen for these is lifted.
    """
    width = max(16, min(tile.channels, power_of_two(channels)))
    cap = tile.registers and (MOST_REGISTERS if channels % width else tile.registers)
    return replace(tile, channels=width, registers=cap)


@functools.lru_cache(SHAPES)
def span_of(programs: int, blocks: int, most: int) -> int:
    """Blocks for each part, where ``programs`` x parts share the work; at most ``most`` parts.

    Of the numbers of parts that fill the largest GPU, the one that keeps the busiest SM for the
    shortest time: a last wave of few programs takes as long as a full one. The same on every GPU:
    partial sums, and with them the bits of the result, follow from the shapes alone.
    """
    most = min(most, blocks)
    fewest = cdiv(PROGRAMS, programs)
    if fewest > most:
        # No number of parts makes that many programs: nearly the most parts will do.
        fewest = cdiv(3 * most, 4)

    def busiest(span: int) -> tuple[int, int]:
        of_one_sm = cdiv(programs * cdiv(blocks, span), SMS)
        return of_one_sm * (span + ENDS), -span

    return min((cdiv(blocks, parts) for parts in range(fewest, most + 1)), key=busiest)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not less than ``value``."""
    return 1 << (value - 1).bit_length()
