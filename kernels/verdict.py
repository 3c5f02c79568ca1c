"""What a compiled kernel costs its users, and whether that is as it should be.

Spills, room, the width of accesses to the streams and the type of matrix products must be right
with every Triton. How many warps stay resident, and on which matrix unit, depends on the compiler:
``record.json`` keeps it for each supported version, and a version without a record is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_mhc.kernels.defaults import DIVISOR
from megatron_mhc.kernels.traffic import arguments, stream_names, variant

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megatron_mhc.kernels.offline import Resources
    from megatron_mhc.kernels.triton.launch import Launch

VECTOR_BITS = 128
# From so many channels on no tile is narrowed to them, so that code is as it was recorded.
WIDE_CHANNELS = 512
WARP = 32
# Operands of a matrix product by the precision asked for; tcgen05 says f16 of bf16 too.
OPERANDS = {'bf16x2': {'bf16', 'f16'}, 'tf32': {'tf32'}, 'tf32x3': {'tf32'}}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (CUDA programming guide, compute capabilities)."""

    warps: int
    blocks: int
    shared_kib: int
    registers: int = 65536
    tensor_columns: int = 512

    @property
    def block_bytes(self) -> int:
        """Shared memory that one block may take; the system keeps 1 KiB of each block."""
        return (self.shared_kib - 1) * 1024


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164),
    86: Multiprocessor(48, 16, 100),
    89: Multiprocessor(48, 24, 100),
    90: Multiprocessor(64, 32, 228),
    100: Multiprocessor(64, 32, 228),
    120: Multiprocessor(48, 24, 100),
}


class Problem(NamedTuple):
    """``value`` grows with the damage, so that an exception can say how much is known."""

    rule: str
    value: int
    text: str


def resident_warps(arch: int, found: Resources, num_warps: int) -> int:
    """Warps of the kernel that one SM of ``sm_<arch>`` holds at a time; 0 where no block fits."""
    limits = MULTIPROCESSORS[arch]
    if found.shared_bytes > limits.block_bytes:
        return 0
    # Each quarter of an SM has a quarter of the registers and gives them out 256 at a time.
    of_warp = -(-found.registers * WARP // 256) * 256
    blocks = [
        limits.registers // 4 // of_warp * 4 // num_warps,
        limits.shared_kib * 1024 // (-(-found.shared_bytes // 128) * 128 + 1024),
        limits.warps // num_warps,
        limits.blocks,
    ]
    if found.tensor_columns:
        blocks.append(limits.tensor_columns // found.tensor_columns)
    return min(blocks) * num_warps


def label(launch: Launch) -> str:
    """A kernel with the constants that change what it does: ``projection mix bias dropout``."""
    flags = [name for name in ('HAS_BIAS', 'DROPOUT') if launch.constants.get(name)]
    return ' '.join([variant(launch), *flags]).replace('HAS_', '').replace('WRITE_', '').lower()


def state(launch: Launch, arch: int, found: Resources) -> str:
    """What the record keeps: resident warps and matrix instructions, ``16 wgmma.bf16``."""
    return f'{resident_warps(arch, found, launch.options["num_warps"])} {found.mma}'


def recorded(
    launch: Launch, arch: int, record: dict[str, Any], version: str, dtype: str
) -> str | None:
    """The ``state`` on record for this launch and Triton ``version``; None where there is none."""
    # A point release may bring another assembler.
    release = version.partition('+')[0]
    channels = arguments(launch).get('C', WIDE_CHANNELS)
    # Masked tails, narrow tiles and other dtypes compile to other code than was recorded.
    alike = launch.constants.get('EVEN', True) and channels >= WIDE_CHANNELS
    if release not in record['triton'] or dtype != record['dtype'] or not alike:
        return None
    name = f'{label(launch)} {launch.constants["N"]}'
    states: list[str | None] | str | None = record['kernels'].get(name, {}).get(str(arch))
    return states[record['triton'].index(release)] if isinstance(states, list) else states


def judge(
    launch: Launch,
    arch: int,
    found: Resources,
    record: dict[str, Any],
    wanted: str | None,
    others: Iterable[Problem] = (),
) -> tuple[list[str], list[str]]:
    """Problems of a compiled kernel with their remedies, and reasons why others are none.

    ``wanted`` is what ``recorded`` gave; ``record`` holds the exceptions; ``others`` are what the
    model of ``roofline`` found.
    """
    problems, notes = [], []
    for problem in (*_always(launch, arch, found), *_lost(launch, arch, found, wanted), *others):
        reason = _reason(launch, arch, problem, record['exceptions'])
        if reason is None:
            problems.append(problem.text)
        else:
            notes.append(f'{problem.text} ({reason})')
    return problems, notes


def _always(launch: Launch, arch: int, found: Resources) -> list[Problem]:
    problems = []
    spilled = found.spill_bytes or found.stack_bytes
    if spilled:
        text = f'spills {spilled} bytes: smaller tile, more warps or more registers'
        problems.append(Problem('spill', spilled, text))
    room = MULTIPROCESSORS[arch].block_bytes
    if found.shared_bytes > room:
        text = f'{found.shared_bytes} bytes of shared memory, sm_{arch} has {room}: smaller tile'
        problems.append(Problem('room', found.shared_bytes, text + ' or fewer stages'))
    if arguments(launch).get('C', 1) % DIVISOR == 0:
        widths = {name: found.narrowest.get(name, VECTOR_BITS) for name in stream_names(launch)}
        narrow = {name: bits for name, bits in widths.items() if bits < VECTOR_BITS}
        if narrow:
            bits = min(narrow.values())
            text = f'{" ".join(narrow)}: {bits} bits an access, not {VECTOR_BITS}'
            problems.append(Problem('vector', -bits, f'{text}: wider tile or fewer warps'))
    precision = launch.constants.get('PRECISION')
    wanted = OPERANDS.get(precision, set()) if precision else set()
    operands = {word.partition('.')[2] for word in found.mma.split() if word != '-'}
    if not operands <= wanted or bool(operands) != bool(wanted):
        text = f'matrix instructions {found.mma} for precision {precision}: operands changed type'
        problems.append(Problem('mma', 0, text))
    return problems


def _lost(launch: Launch, arch: int, found: Resources, wanted: str | None) -> list[Problem]:
    """What the same Triton version once did better."""
    if wanted is None:
        return []
    problems = []
    warps, _, units = wanted.partition(' ')
    seen = resident_warps(arch, found, launch.options['num_warps'])
    if seen < int(warps):
        taken = f'{found.registers} registers, {found.shared_bytes} bytes of shared memory'
        text = f'{seen} warps an SM ({taken}), {warps} on record: mend it, or record it anew'
        problems.append(Problem('occupancy', int(warps) - seen, text))
    if found.mma != units:
        text = f'matrix instructions {found.mma}, {units} on record: mend it, or record it anew'
        problems.append(Problem('mma', 0, text))
    return problems


def _reason(
    launch: Launch, arch: int, problem: Problem, exceptions: list[dict[str, Any]]
) -> str | None:
    kernel, n = label(launch), launch.constants['N']
    for noted in exceptions:
        known = kernel.startswith(noted['kernel']) and problem.rule == noted['rule']
        known = known and n == noted['num_streams'] and arch in noted.get('arch', [arch])
        # Some are of channels that fill no tile, whose masks take registers, or of one precision.
        known = known and not (noted.get('masked') and launch.constants.get('EVEN', True))
        known = known and noted.get('precision') in (None, launch.constants.get('PRECISION'))
        # Of an access a limit says how narrow it may be, of all else how much there may be.
        if known and problem.value <= noted['limit'] * (-1 if problem.rule == 'vector' else 1):
            return str(noted['reason'])
    return None
