"""One warp alone on its way through a piece of code, in cycles.

Instructions issue in order. Each waits for the registers that it reads and for its pipe, and what
reads a load for the memory. Other warps of the SM hide that; ``predict`` counts them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.operands import registers
from megatron_mhc.kernels.roofline.pipes import LOADS, TIMED, cycles, pipe
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
BARRIER, BRANCH, WARPGROUP_WAIT = 25, 8, 40
LEAST_LSU_CYCLES = 2
# Loads at least this wide, in bits, are of streams and come from memory; narrower ones are of maps
# and parameters, which are read many times, and come from L2. A narrow load of a stream (the report
# notes those) is taken for one of a map: its wait comes out short.
STREAM_BITS = 128


def wide(instruction: Instruction) -> bool:
    """Whether it loads a part of a stream, and waits for memory."""
    return instruction.head in LOADS and instruction.bits >= STREAM_BITS


def walk(body: Sequence[Instruction], gpu: Gpu, passes: int = 2) -> float:
    """Cycles of the last of ``passes``: the second of two is a loop in its steady state."""
    steps = [_step(instruction, gpu) for instruction in body if pipe(instruction)]
    ready: dict[str, float] = defaultdict(float)
    free: dict[str, float] = defaultdict(float)
    now, start = 0.0, 0.0
    for _ in range(passes):
        start = now
        for step in steps:
            at = max(now, free[step.pipe], *(ready[name] for name in step.read))
            free[step.pipe] = at + step.taken
            at += step.stall
            for name in step.written:
                ready[name] = at + step.latency
            now = at + 1
    return now - start


class _Step(NamedTuple):
    """An instruction as the walk sees it; all but registers in cycles."""

    pipe: str
    taken: float
    stall: int
    latency: float
    written: list[str]
    read: list[str]


def _step(instruction: Instruction, gpu: Gpu) -> _Step:
    kind = pipe(instruction)
    # Of the other pipes the issue slot is all that they take, which ``now`` counts.
    taken = cycles(instruction, gpu) if kind in TIMED else 0.0
    if kind == 'lsu':
        taken = max(LEAST_LSU_CYCLES, taken)
    latency = _latency(instruction, kind, gpu)
    return _Step(kind, taken, _stall(instruction), latency, *registers(instruction))


def _latency(instruction: Instruction, kind: str, gpu: Gpu) -> float:
    if instruction.head in LOADS:
        return gpu.dram_cycles if wide(instruction) else gpu.l2_latency
    return LATENCY.get(instruction.head, LATENCY_OF_PIPE.get(kind, OTHER_LATENCY))


def _stall(instruction: Instruction) -> int:
    """Cycles for which a warp issues nothing at barriers and branches."""
    if instruction.head == 'WARPGROUP':
        return WARPGROUP_WAIT if 'DEPBAR' in instruction.name else 0
    return {'BAR': BARRIER, 'BRA': BRANCH}.get(instruction.head, 0)
