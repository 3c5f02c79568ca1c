"""A timeline in letters, for a terminal."""

from __future__ import annotations

from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import (
    Row,
    chunk_words,
    drawn_rows,
    figures,
    label,
    lane_words,
    marks,
    most_chunks,
    notation,
    title,
    unit,
)
from megatron_mhc.schedules.render_window import FINEST, MOST_WIDE, Window, excerpt, window_of
from megatron_mhc.schedules.timeline import COMPUTE_LANE, HIGH_LANE, Timeline

_TICK = 10  # columns between two numbers of the axis, at least
_GAP = ' ~~ '
_MOST_CELLS = 10**8  # of all lines


def render_text(
    timeline: Timeline,
    width: int = 100,
    lanes: tuple[str, ...] = (COMPUTE_LANE, HIGH_LANE),
    window: Window | None = None,
) -> str:
    """One line a rank and lane, time to the right.

    Args:
        timeline: from ``simulate``.
        width: columns; a longer step shows its beginning and its end. 0 for all of it, as far as
            a file can hold it.
        lanes: which lanes; ranks on which nothing there takes time do without its line.
        window: a part of the step; None for all of it.
    """
    window = window or window_of(timeline)
    shown = drawn_rows(timeline, lanes, window)
    scale = _columns_per_unit(timeline)
    total = round(window.length * scale)
    names = [f'rank {row.rank} {lane_words(row)}'.rstrip() for row in shown]
    margin = max(map(len, names))
    room = min(width - margin - 1 if width else total, MOST_WIDE, _MOST_CELLS // len(shown))
    room = max(room, 2 * _TICK)
    parts, columns = [window], [(0, total)]
    if total > room:
        head = (room - len(_GAP) + 1) // 2
        tail = room - len(_GAP) - head
        parts = [
            Window(window.start, window.start + head / scale),
            Window(window.end - tail / scale, window.end),
        ]
        columns = [(0, head), (total - tail, total)]
    lines = [
        _GAP.join(_draw(timeline, row, scale, window.start, *part) for part in columns)
        for row in shown
    ]
    axis = zip(parts, columns, strict=True)
    lines.append(_GAP.join(_axis(part, scale, window.start, *where) for part, where in axis))
    drawn = [
        f'{name:{margin}} {line}'.rstrip() for name, line in zip([*names, ''], lines, strict=True)
    ]
    above = [title(timeline), figures(timeline), excerpt(timeline, parts)]
    return '\n'.join([*filter(None, above), *drawn, *_legend(timeline)]) + '\n'


def _columns_per_unit(timeline: Timeline) -> float:
    """So many that the label of the shortest operation, and a space, fits."""
    wide, short = 2.0, float('inf')
    for entry in timeline.entries:
        if entry.lane == COMPUTE_LANE and entry.op.kind is not Kind.R and entry.end > entry.start:
            parts = len(entry.op.leaves)
            wide = max(wide, len(label(timeline.plan, entry.op)) / parts)
            short = min(short, (entry.end - entry.start) / parts)
    if short == float('inf'):
        return 1.0
    return (int(wide) + 1) / max(short, timeline.makespan * FINEST)


def _draw(timeline: Timeline, row: Row, scale: float, origin: float, begin: int, stop: int) -> str:
    """The columns from ``begin`` to ``stop`` of a row, counted from the time ``origin``."""
    cells = ['.' if row.name == COMPUTE_LANE else ' '] * (stop - begin)
    for entry in row.entries:
        first, last = (round((time - origin) * scale) for time in (entry.start, entry.end))
        start, end = max(first, begin), min(last, stop)
        if end <= start:
            continue
        text, room = label(timeline.plan, entry.op), end - start
        # Half a number would name another microbatch; behind a gap no label has its space.
        cut = (start, end) != (first, last) or text[room - 1 : room + 1].isdigit()
        if first < begin != 0 or (len(text) > room and cut):
            text = ''
        # A space before the next operation, where the label leaves one.
        cells[start - begin : end - begin] = text[:room].ljust(room - 1, '-').ljust(room)
    return ''.join(cells)


def _axis(window: Window, scale: float, origin: float, begin: int, stop: int) -> str:
    step = 1.0
    while step * scale < _TICK:
        step *= 2
    line = ''
    for time in marks(window, step):
        longer = line.ljust(round((time - origin) * scale) - begin) + f'{time:g}'
        if len(longer) <= stop - begin:
            line = longer
    return line.ljust(stop - begin)


def _legend(timeline: Timeline) -> list[str]:
    plan = timeline.plan
    letters = 'B backward, I and W its halves (gradients of input and of weights), '
    letters += 'R recompute, ' * (Kind.R in plan.kinds) + '. idle'
    lines = [unit(timeline), notation(plan), letters]
    if most_chunks(plan) > 1:
        lines.append('; '.join(chunk_words(plan, chunk) for chunk in range(most_chunks(plan))))
    return lines
