"""What all pictures of a timeline share: rows without overlap, labels, colours, words."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from megatron_mhc.schedules.plan import Kind, Op, Plan
from megatron_mhc.schedules.render_window import Window
from megatron_mhc.schedules.timeline import (
    COMMUNICATION_LANE,
    COMPUTE_LANE,
    HIGH_LANE,
    LANES,
    Entry,
    Timeline,
)

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
_LANES = {COMMUNICATION_LANE: 'messages', HIGH_LANE: 'side stream'}


class Row(NamedTuple):
    """Entries of one rank that do not overlap, by start; ``name`` is its lane, numbered if many."""

    rank: int
    name: str
    entries: list[Entry]


def rows(
    timeline: Timeline, lanes: tuple[str, ...] = LANES, window: Window | None = None
) -> list[Row]:
    """The entries of ``timeline`` on as few rows a lane as do not overlap, by rank and lane.

    A compute lane is there even if empty, others only if something runs on them. With a ``window``
    only what it shows.
    """
    found: dict[tuple[int, str], list[list[Entry]]] = {
        (rank, lane): [[]] if lane == COMPUTE_LANE else []
        for rank in range(timeline.plan.pp)
        for lane in lanes
    }
    for entry in timeline.entries:
        lines = found.get((entry.rank, entry.lane))
        if lines is None or not (window is None or window.shows(entry)):
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


def drawn_rows(timeline: Timeline, lanes: tuple[str, ...], window: Window) -> list[Row]:
    """Those of a picture: a lane beside compute is left out where nothing on it takes time."""
    return [
        row
        for row in rows(timeline, lanes, window)
        if row.name == COMPUTE_LANE or any(entry.end > entry.start for entry in row.entries)
    ]


def lane_words(row: Row) -> str:
    """``messages 2``: what is beside the compute of a rank; empty for that."""
    lane, _, number = row.name.partition(' ')
    return f'{_LANES[lane]} {number}'.strip() if lane in _LANES else ''


def most_chunks(plan: Plan) -> int:
    """How many stages a rank holds, at most."""
    return max(map(len, plan.chunks))


def chunk_of(plan: Plan, op: Op) -> int:
    """Which of the stages that its rank holds ``op`` belongs to, from 0."""
    rank = plan.rank_of(op.stage, op.direction)
    return plan.chunks[rank].index((op.stage, op.direction))


def chunk_words(plan: Plan, chunk: int) -> str:
    """``chunk 1: stages 4 to 7``: what the ranks hold as their chunk of that number."""
    held = [chunks[chunk] for chunks in plan.chunks if len(chunks) > chunk]
    stages = sorted(stage for stage, _ in held)
    listed = f'{stages[0]} to {stages[-1]}'
    if stages != [*range(stages[0], stages[-1] + 1)]:
        listed = ', '.join(map(str, stages))
    name = f'chunk {chunk}'
    if plan.directions > 1:
        # Both hold the same stages; microbatches enter each from its own end of the pipeline.
        name += f', model copy {held[0][1]}'
    return f'{name}: stages {listed}'


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
    if most_chunks(plan) > 2:
        return f'{op.stage}{text}'
    return text.lower() if chunk_of(plan, op) else text


def notation(plan: Plan) -> str:
    """How to read the labels."""
    most = most_chunks(plan)
    text = 'F3: forward of microbatch 3'
    if most == 2:
        text += '; small letters: the same on chunk 1 of its rank'
    if most > 2:
        text = '5F3: forward of microbatch 3 through stage 5'
    if Kind.FUSE in plan.kinds:
        text += '; F3+B1: both at once'
    return text


def title(timeline: Timeline) -> str:
    """One line above a picture: whose it is."""
    plan = timeline.plan
    return f'{plan.schedule}: {plan.pp} ranks, {plan.microbatches} microbatches'


def figures(timeline: Timeline) -> str:
    """One line above a picture: its numbers, each with what it is."""
    return (
        f'total time {timeline.makespan:.6g}; bubble (busiest rank idle) {timeline.bubble:.6g}, '
        f'{100 * timeline.bubble_share:.1f} %; at most {timeline.peak_live:.6g} microbatches in '
        'flight'
    )


def unit(timeline: Timeline) -> str:
    """What the axis counts."""
    forward = timeline.times.forward
    return f'time; the forward of one microbatch through all stages of a rank takes {forward:g}'


def tick_step(length: float, ticks: int = 12) -> float:
    """A round distance, 1, 2 or 5 times a power of ten, for about ``ticks`` marks on the axis."""
    step = 1.0
    while step * ticks > length > 0:
        step /= 10
    while step * ticks < length:
        for factor in (1, 2, 5, 10):
            if step * factor * ticks >= length or factor == 10:
                step *= factor
                break
    return step


def marks(window: Window, step: float) -> list[float]:
    """The multiples of ``step`` in ``window``."""
    first = ceil(window.start / step - 1e-9)
    last = int(window.end / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
