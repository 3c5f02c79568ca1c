"""Which registers an instruction writes and which it reads, from its operands as printed.

Wide operands are printed by their first register. What is not known counts as one register: then a
wait may be missed, and the time through one warp comes out short.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_mhc.kernels.roofline.pipes import matrices
from megatron_mhc.kernels.roofline.sass import REGISTER_BITS, Instruction

REGISTER = re.compile(r'\b(UR|R|UP|P)(\d+)((?:\.\w+)*)')
# Commas in brackets separate parts of one address.
COMMA = re.compile(r',(?![^\[]*\])')
# They write no register.
SILENT = frozenset(
    'STG STS STSM STL ST RED REDG LDGSTS UTMALDG UTMASTG SYNCS BAR BRA EXIT DEPBAR LDGDEPBAR '
    'WARPSYNC WARPGROUP BSSY BSYNC FENCE NOP MEMBAR CCTL ERRBAR'.split()
)
LOADS = frozenset('LDG LDS LDL LD'.split())
STORES = frozenset('STG STS ST'.split())
# Their second operand may be a predicate that they write too.
TWO_RESULTS = frozenset('ISETP FSETP PLOP3 IADD3 LOP3'.split())
MMA_REGISTERS = (4, 4, 2, 4)  # of D, A, B and C of HMMA.16816


@lru_cache(maxsize=4096)
def registers(instruction: Instruction) -> tuple[list[str], list[str]]:
    """``(written, read)``, each register by its name, ``R4``; a guard is read."""
    written: list[str] = []
    read: list[str] = []
    head = instruction.head
    operands = instruction.operands
    parts = COMMA.split(operands) if '[' in operands else operands.split(',')
    for place, part in enumerate(map(str.strip, parts)):
        for name, number, suffix in REGISTER.findall(part):
            first = place == 0 and head not in SILENT and '[' not in part
            second = place == 1 and head in TWO_RESULTS and 'P' in name and part[0] != '!'
            count = _count(instruction, place, first, suffix)
            names = [f'{name}{int(number) + i}' for i in range(count)]
            (written if first or second else read).extend(names)
    if instruction.guard not in ('', 'PT', 'UPT'):
        read.append(instruction.guard)
    return written, read


def _count(instruction: Instruction, place: int, result: bool, suffix: str) -> int:
    head, words = instruction.head, max(1, instruction.bits // REGISTER_BITS)
    if head == 'HMMA':
        return MMA_REGISTERS[place] if place < len(MMA_REGISTERS) else 1
    if result:
        if head in LOADS:
            return words
        if head == 'LDSM':
            return matrices(instruction)
        if head == 'HGMMA':
            # A thread holds half of the 64 x n results of four warps in fp32, 64 n / 128.
            shape = re.search(r'64x(\d+)x', instruction.name)
            return int(shape[1]) // 2 if shape else 16
        return 2 if 'WIDE' in instruction.name else 1
    if head in STORES and place > 0:
        return words
    return 2 if '.64' in suffix else 1
