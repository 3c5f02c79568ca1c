"""Which pipe an instruction takes, and for how many cycles.

Cycles are those of one warp in its quarter of an SM, of ``lsu`` in the SM. They follow from results
per clock and SM in the "CUDA C++ Programming Guide" (arithmetic instructions): 64 of integers and
logic, 16 of the special functions, 32 of a shuffle; 128 bytes per clock and SM from L1 and shared
memory; and the matrix units' rate in ``gpus``. Which pipe a name belongs to is nowhere
written; integer multiplication shares the fp32 pipe at half its rate.
"""

from __future__ import annotations

import re

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.sass import REGISTER_BITS, Instruction

FMA = frozenset('FFMA FMUL FADD IMAD HFMA2 HMUL2 FFMA2'.split())
XU = frozenset('MUFU F2I I2F F2F'.split())
TENSOR = frozenset('HMMA HGMMA'.split())
# Copies to shared memory that a warp does not wait for at once.
ASYNC = frozenset('LDGSTS UTMALDG'.split())
LOADS = frozenset('LDG LD'.split())
LSU = LOADS | ASYNC
LSU |= set('STG LDS STS LDSM STSM SHFL RED REDG ATOM ATOMG LDL STL LDC UTMASTG ST SYNCS'.split())
CONTROL = frozenset(
    'BAR WARPSYNC DEPBAR LDGDEPBAR WARPGROUP FENCE MEMBAR BSSY BSYNC BRA EXIT ELECT CCTL ERRBAR '
    'NANOSLEEP CALL RET S2R S2UR R2UR REDUX'.split()
)
# Bound by their own rate; the others by how many instructions a quarter of an SM issues.
TIMED = ('fma', 'alu', 'xu', 'tensor', 'lsu')
ALU_CYCLES, XU_CYCLES, INTEGER_PRODUCT_CYCLES = 2, 8, 2
TF32_CYCLES = 2  # times those of bf16
SHAPE = re.compile(r'\.(?:64x(?P<n>\d+)x(?P<k>\d+)|168(?P<depth>8|16)(?=\D|$))')


PIPES = {
    head: name
    for name, heads in {
        **{'fma': FMA, 'xu': XU, 'tensor': TENSOR, 'lsu': LSU, 'control': CONTROL},
        '': ('NOP',),
    }.items()
    for head in heads
}


def pipe(instruction: Instruction) -> str:
    """``fma alu xu tensor lsu uniform control``, or empty for what takes no slot.

    What is not known is taken for ``alu``: most of the rest is integers and logic.
    """
    head = instruction.head
    return PIPES.get(head, 'uniform' if head.startswith('U') else 'alu')


def cycles(instruction: Instruction, gpu: Gpu) -> float:
    """Cycles for which a warp's instruction takes its pipe; 1 where only the issue counts."""
    head, kind = instruction.head, pipe(instruction)
    if kind == 'fma':
        return INTEGER_PRODUCT_CYCLES if head == 'IMAD' else gpu.fma_cycles
    if kind == 'tensor':
        return tensor_cycles(instruction, gpu)
    if kind == 'lsu' and head != 'SHFL':
        if head in ('LDSM', 'STSM'):
            return matrices(instruction)
        return max(1, instruction.bits // REGISTER_BITS)
    return {'alu': ALU_CYCLES, 'xu': XU_CYCLES}.get(kind, 1)


def matrices(instruction: Instruction) -> int:
    """8 x 8 matrices that ``LDSM`` or ``STSM`` moves, one register of a thread each."""
    last = instruction.name.rpartition('.')[2]
    return int(last) if last in ('2', '4') else 1


def tensor_cycles(instruction: Instruction, gpu: Gpu) -> float:
    """Of ``HMMA.16816`` (16 x 8 x 16 for a warp) and ``HGMMA.64x32x16`` (for four warps)."""
    shape = SHAPE.search(instruction.name)
    if instruction.head == 'HGMMA':
        n, k = (int(shape['n']), int(shape['k'])) if shape and shape['n'] else (32, 16)
        spent = 16 * n * k / gpu.tensor_fma
    else:
        depth = int(shape['depth']) if shape and shape['depth'] else 16
        spent = 16 * 8 * depth / gpu.tensor_fma / gpu.mma_share
    return spent * (TF32_CYCLES if 'TF32' in instruction.name else 1)
