"""What all pictures of a timeline share: rows without overlap, labels, colours."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mhc.schedules.plan import Kind, Op, Plan
from megatron_mhc.schedules.timeline import COMPUTE_LANE, LANES, Entry, Timeline

# For readers who cannot tell red from green: Okabe and Ito's palette, lightened under black text.
COLOURS = {
    Kind.F: '#7fb8e6',
    Kind.B: '#6ccbae',
    Kind.I: '#b5d96c',
    Kind.W: '#f2c063',
    Kind.R: '#d9a7c7',
    Kind.SEND: '#c9c9c9',
    Kind.REDUCE: '#e08a57',
    Kind.PARAM_SYNC: '#f0e68c',
}
NAMES = {
    Kind.F: 'forward',
    Kind.B: 'backward',
    Kind.I: 'input gradient',
    Kind.W: 'weight gradient',
    Kind.R: 'recompute',
    Kind.FUSE: 'fused slot',
    Kind.SEND: 'hop',
    Kind.REDUCE: 'gradient reduction',
    Kind.PARAM_SYNC: 'parameter gather',
}


class Row(NamedTuple):
    """Entries of one rank that do not overlap, by start; ``name`` is its lane, numbered if many."""

    rank: int
    name: str
    entries: list[Entry]


def rows(timeline: Timeline, lanes: tuple[str, ...] = LANES) -> list[Row]:
    """The entries of ``timeline`` on as few rows a lane as do not overlap, by rank and lane.

    A compute lane is there even if empty, others only if something runs on them.
    """
    found: dict[tuple[int, str], list[list[Entry]]] = {
        (rank, lane): [[]] if lane == COMPUTE_LANE else []
        for rank in range(timeline.plan.pp)
        for lane in lanes
    }
    for entry in timeline.entries:
        lines = found.get((entry.rank, entry.lane))
        if lines is None:
            continue
        free = (line for line in lines if not line or line[-1].end <= entry.start + 1e-9)
        line = next(free, None)
        if line is None:
            line = []
            lines.append(line)
        line.append(entry)
    return [
        Row(rank, lane if number == 1 else f'{lane} {number}', line)
        for (rank, lane), lines in found.items()
        for number, line in enumerate(lines, 1)
    ]


def second_chunk(plan: Plan, op: Op) -> bool:
    """Whether ``op`` belongs to another than the first chunk that its rank holds."""
    rank = plan.rank_of(op.stage, op.direction)
    return plan.chunks[rank].index((op.stage, op.direction)) > 0


def label(plan: Plan, op: Op) -> str:
    """``op`` in few letters.

    Kind and microbatch; small letters on a rank's second chunk. With more chunks than two the stage
    stands in front: only then is it needed to tell what runs.
    """
    if op.parts:
        return '+'.join(label(plan, part) for part in op.parts)
    if op.microbatch < 0:
        return f'{op.kind}{op.stage}'
    text = f'{op.payload or op.kind}{op.microbatch}{">" * bool(op.payload)}'
    if max(map(len, plan.chunks)) > 2:
        return f'{op.stage}{text}'
    return text.lower() if second_chunk(plan, op) else text


def title(timeline: Timeline) -> str:
    """One line above a picture."""
    plan = timeline.plan
    return (
        f'{plan.schedule}: {plan.pp} ranks, {plan.microbatches} microbatches, '
        f'step {timeline.makespan:.6g}, bubble {timeline.bubble:.6g} '
        f'({100 * timeline.bubble_share:.1f} %), peak {timeline.peak_live:.6g} live'
    )


def tick_step(makespan: float, ticks: int = 12) -> float:
    """A round distance, 1, 2 or 5 times a power of ten, for about ``ticks`` marks on the axis."""
    step = 1.0
    while step * ticks > makespan > 0:
        step /= 10
    while step * ticks < makespan:
        for factor in (1, 2, 5, 10):
            if step * factor * ticks >= makespan or factor == 10:
                step *= factor
                break
    return step
