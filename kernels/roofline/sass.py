"""Machine code as ``nvdisasm -c`` prints it: instructions, and the loops that branches back make.

Nothing here knows a GPU or a kernel. NVIDIA lists the instructions by name in its "CUDA binary
utilities", and says no more about them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

# /*0070*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
INSTRUCTION = re.compile(
    r'^\s*/\*[0-9a-f]+\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<rest>[^;]*);'
)
LABEL = re.compile(r'^\s*(?P<label>\.L_x_\d+):')
TARGET = re.compile(r'`\((\.L_x_\d+)\)')
WIDTHS = {'U8': 8, 'S8': 8, 'U16': 16, 'S16': 16, '64': 64, '128': 128, '256': 256}
REGISTER_BITS = 32
LANES = 32
# A loop of at most so many instructions, with a barrier and none of these, only waits.
LONGEST_WAIT = 8
WORK = frozenset('LDG LDGSTS LDS STG STS FFMA FADD FMUL HMMA HGMMA UTMALDG'.split())


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp: ``LDG.E.128`` with its operands as text.

    ``guard`` is the predicate under which it runs, without its sign, or empty.
    """

    name: str
    operands: str = ''
    guard: str = ''

    @cached_property
    def head(self) -> str:
        """The name without modifiers: ``LDG``."""
        return self.name.partition('.')[0]

    @cached_property
    def bits(self) -> int:
        """Width of an access for one thread."""
        return next((WIDTHS[m] for m in self.name.split('.') if m in WIDTHS), REGISTER_BITS)

    @property
    def bytes(self) -> int:
        """Bytes of an access for the 32 threads of a warp."""
        return self.bits // 8 * LANES


@dataclass(frozen=True)
class Loop:
    """Instructions ``first`` to ``last`` (its backward branch), both included."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        """Whether ``other`` is a loop inside this one."""
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel and its loops in the order of their first instructions."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def own(self, loop: Loop | None) -> list[Instruction]:
        """Instructions that are in ``loop`` (None: in the kernel) and in no loop inside it."""
        first, last = (loop.first, loop.last) if loop else (0, len(self.instructions) - 1)
        inner = [other for other in self.loops if loop is None or loop.holds(other)]
        return [
            self.instructions[i]
            for i in range(first, last + 1)
            if not any(other.first <= i <= other.last for other in inner)
        ]


def parse(text: str) -> Code:
    """The code in ``nvdisasm -c`` of a file with one kernel.

    A branch to itself, which pads the end, is no loop, nor is a wait for a barrier that asks again
    until it is there; of branches to one place the last counts.

    Raises:
        RuntimeError: no instruction is found, so the text has another form than is known.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label['label']] = len(instructions)
        elif found := INSTRUCTION.match(line):
            guard = (found['guard'] or '').lstrip('!')
            instructions.append(Instruction(found['name'], found['rest'].strip(), guard))
    if not instructions:
        raise RuntimeError(
            'nvdisasm printed no instruction that is understood; take that of Triton'
        )
    ends: dict[int, int] = {}
    waited = False
    for at, instruction in enumerate(instructions):
        target = TARGET.search(instruction.operands) if instruction.head == 'BRA' else None
        first = labels.get(target[1], at) if target else at
        # Waits stand behind the code, and go back to it.
        back, waited = waited, first < at and _waits(instructions[first:at])
        if first < at and not (waited or back):
            ends[first] = at
    return Code(tuple(instructions), tuple(Loop(*ends) for ends in sorted(ends.items())))


def _waits(body: list[Instruction]) -> bool:
    """Whether a loop does nothing but ask for a barrier, as behind the copies of TMA."""
    heads = {instruction.head for instruction in body}
    return 'SYNCS' in heads and len(body) <= LONGEST_WAIT and not heads & WORK
