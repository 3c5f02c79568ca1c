"""A timeline in letters, for a terminal."""

from __future__ import annotations

from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import Row, label, rows, title
from megatron_mhc.schedules.timeline import COMPUTE_LANE, HIGH_LANE, Timeline

_TICK = 10  # columns between two numbers of the axis, at least
_GAP = ' ~~ '


def render_text(
    timeline: Timeline, width: int = 100, lanes: tuple[str, ...] = (COMPUTE_LANE, HIGH_LANE)
) -> str:
    """One line a rank and lane, time to the right.

    Args:
        timeline: from ``simulate``.
        width: columns; a longer step shows its beginning and its end. 0 for all of it.
        lanes: which lanes; ranks on which nothing there takes time do without its line.
    """
    shown = [
        row
        for row in rows(timeline, lanes)
        if row.name == COMPUTE_LANE or any(e.end > e.start for e in row.entries)
    ]
    scale = _columns_per_unit(timeline)
    total = round(timeline.makespan * scale)
    names = [_name(row) for row in shown]
    margin = max(map(len, names))
    room = max(width - margin - 1, 2 * _TICK) if width else total
    head = tail = 0
    if total > room:
        head = (room - len(_GAP) + 1) // 2
        tail = room - len(_GAP) - head
    cuts = (head, total - tail) if head else ()
    lines = [''.join(_draw(timeline, row, scale, total, cuts)) for row in shown]
    lines.append(_axis(timeline.makespan, scale, total))
    if head:
        lines = [line[:head] + _GAP + line[total - tail :].ljust(tail) for line in lines]
    drawn = [
        f'{name:{margin}} {line}'.rstrip() for name, line in zip([*names, ''], lines, strict=True)
    ]
    return '\n'.join([title(timeline), *drawn, _legend(timeline, bool(head))]) + '\n'


def _columns_per_unit(timeline: Timeline) -> float:
    """So many that the label of the shortest operation, and a space, fits."""
    wide, short = 2.0, float('inf')
    for entry in timeline.entries:
        if entry.lane == COMPUTE_LANE and entry.op.kind is not Kind.R and entry.end > entry.start:
            parts = len(entry.op.leaves)
            wide = max(wide, len(label(timeline.plan, entry.op)) / parts)
            short = min(short, (entry.end - entry.start) / parts)
    return (int(wide) + 1) / short if short < float('inf') else 1.0


def _name(row: Row) -> str:
    return f'rank {row.rank}' if row.name == COMPUTE_LANE else f'rank {row.rank} {row.name}'


def _draw(
    timeline: Timeline, row: Row, scale: float, total: int, cuts: tuple[int, ...]
) -> list[str]:
    cells = ['.' if row.name == COMPUTE_LANE else ' '] * total
    for entry in row.entries:
        start, end = round(entry.start * scale), round(entry.end * scale)
        if end == start:
            continue
        text = label(timeline.plan, entry.op)[: end - start]
        if any(start < cut < start + len(text) for cut in cuts):
            # Half a number would name another microbatch.
            text = ''
        # A space before the next operation, where the label leaves one.
        cells[start:end] = text.ljust(end - start - 1, '-').ljust(end - start)
    return cells


def _axis(makespan: float, scale: float, total: int) -> str:
    step = 1.0
    while step * scale < _TICK:
        step *= 2
    line = ''
    for mark in range(int(makespan / step) + 1):
        longer = line.ljust(round(mark * step * scale)) + f'{mark * step:g}'
        if len(longer) <= total:
            line = longer
    return line.ljust(total)


def _legend(timeline: Timeline, clipped: bool) -> str:
    text = 'F3: forward of microbatch 3, B backward, I and W its halves, . idle'
    most = max(map(len, timeline.plan.chunks))
    if most == 2:
        text += ", small letters: the rank's second chunk"
    if most > 2:
        text = 'stage in front: 5F3; ' + text
    return text + ('; ~~ the middle is left out' if clipped else '')
