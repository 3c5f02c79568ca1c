"""One warp alone on its way through a piece of code, in cycles.

Instructions issue in order. Each waits for the registers that it reads and for its pipe, and what
reads a load for the memory. Copies to shared memory come in groups, which a wait counts: a loop
that starts the copies of its next pass last waits for all of memory's latency, one with a buffer
more for what a pass in between leaves of it. Other warps hide that; ``predict`` counts them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.operands import registers
from megatron_mhc.kernels.roofline.pipes import ASYNC, LOADS, TIMED, cycles, pipe
from megatron_mhc.kernels.roofline.sass import Instruction

# Cycles until a result can be read ("Dissecting the NVIDIA Hopper Architecture through
# Microbenchmarking" and its forerunners for older GPUs; rounded, and alike enough on all).
LATENCY = {
    **{'MUFU': 20, 'LDS': 30, 'LDSM': 33, 'SHFL': 24, 'HMMA': 33, 'HGMMA': 40, 'S2R': 20},
    **{'S2UR': 20, 'LDC': 30, 'ULDC': 20, 'F2F': 16, 'I2F': 16, 'F2I': 16, 'R2UR': 12, 'LDL': 30},
    **{'ATOM': 700, 'ATOMG': 700},
}
LATENCY_OF_PIPE = {'fma': 5, 'alu': 5, 'uniform': 12}
OTHER_LATENCY = 6
# Copies of several passes under way arrive together: the mean of so many passes, behind as many.
COPY_PASSES = 12
BARRIER, BRANCH, WARPGROUP_WAIT = 25, 8, 40
LEAST_LSU_CYCLES = 2
# Loads at least this wide, in bits, are of streams and come from memory; narrower ones are of maps
# and parameters, which are read many times, and come from L2. A narrow load of a stream (the report
# notes those) is taken for one of a map: its wait comes out short.
STREAM_BITS = 128
# LDGDEPBAR closes a group of copies; DEPBAR.LE SB0, 0x1 waits for all groups but the last one.
GROUPS_LEFT = re.compile(r'SB\d+, *(0x[0-9a-f]+)')


def wide(instruction: Instruction) -> bool:
    """Whether it loads a part of a stream, or copies one, from memory."""
    return instruction.head in LOADS | ASYNC and instruction.bits >= STREAM_BITS


def walk(body: Sequence[Instruction], gpu: Gpu, passes: int = 2) -> float:
    """Cycles of the last of ``passes``: the second of two is a loop in its steady state.

    One that copies ahead takes more passes to come to it, and its passes take turns in waiting.
    """
    steps = [_step(instruction, gpu) for instruction in body if pipe(instruction)]
    ready: dict[str, float] = defaultdict(float)
    free: dict[str, float] = defaultdict(float)
    groups: list[float] = []  # when the copies of each are there
    now, start, copied = 0.0, 0.0, 0.0
    counted = COPY_PASSES if passes > 1 and any(step.copies for step in steps) else 1
    for remaining in range(passes * counted, 0, -1):
        if remaining == counted:
            start = now
        for step in steps:
            at = max(now, free[step.pipe], *(ready[name] for name in step.read))
            free[step.pipe] = at + step.taken
            at += step.stall
            if step.copies:
                copied = max(copied, at + step.latency)
            if step.closes:
                groups.append(copied)
                copied = 0.0
            if step.left is not None:
                at = max([at, *groups[: max(0, len(groups) - step.left)]])
            for name in step.written:
                ready[name] = at + step.latency
            now = at + 1
    return (now - start) / counted


class _Step(NamedTuple):
    """An instruction as the walk sees it; all but registers in cycles."""

    pipe: str
    taken: float
    stall: int
    latency: float
    written: list[str]
    read: list[str]
    copies: bool
    closes: bool
    left: int | None  # groups of copies that a wait leaves under way


def _step(instruction: Instruction, gpu: Gpu) -> _Step:
    kind = pipe(instruction)
    # Of the other pipes the issue slot is all that they take, which ``now`` counts.
    taken = cycles(instruction, gpu) if kind in TIMED else 0.0
    if kind == 'lsu':
        taken = max(LEAST_LSU_CYCLES, taken)
    latency = _latency(instruction, kind, gpu)
    wait = GROUPS_LEFT.search(instruction.operands) if instruction.head == 'DEPBAR' else None
    return _Step(
        kind,
        taken,
        _stall(instruction),
        latency,
        *registers(instruction),
        copies=instruction.head in ASYNC,
        closes=instruction.head == 'LDGDEPBAR',
        left=int(wait[1], 16) if wait else None,
    )


def _latency(instruction: Instruction, kind: str, gpu: Gpu) -> float:
    if instruction.head in LOADS | ASYNC:
        return gpu.dram_cycles if wide(instruction) else gpu.l2_latency
    return LATENCY.get(instruction.head, LATENCY_OF_PIPE.get(kind, OTHER_LATENCY))


def _stall(instruction: Instruction) -> int:
    """Cycles for which a warp issues nothing at barriers and branches."""
    if instruction.head == 'WARPGROUP':
        return WARPGROUP_WAIT if 'DEPBAR' in instruction.name else 0
    return {'BAR': BARRIER, 'BRA': BRANCH}.get(instruction.head, 0)
