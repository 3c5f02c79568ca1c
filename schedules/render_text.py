"""A timeline in letters, for a terminal."""

from __future__ import annotations

from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import (
    Row,
    chunk_words,
    drawn_rows,
    figures,
    label,
    marks,
    most_chunks,
    notation,
    title,
    unit,
)
from megatron_mhc.schedules.render_window import Window, excerpt, window_of
from megatron_mhc.schedules.timeline import COMPUTE_LANE, HIGH_LANE, Timeline

_TICK = 10  # columns between two numbers of the axis, at least
_GAP = ' ~~ '


def render_text(
    timeline: Timeline,
    width: int = 100,
    lanes: tuple[str, ...] = (COMPUTE_LANE, HIGH_LANE),
    window: Window | None = None,
) -> str:
    """One line a rank and lane, time to the right.

    Args:
        timeline: from ``simulate``.
        width: columns; a longer step shows its beginning and its end. 0 for all of it.
        lanes: which lanes; ranks on which nothing there takes time do without its line.
        window: a part of the step; None for all of it.
    """
    window = window or window_of(timeline)
    shown = drawn_rows(timeline, lanes, window)
    scale = _columns_per_unit(timeline)
    total = round(window.length * scale)
    names = [_name(row) for row in shown]
    margin = max(map(len, names))
    room = max(width - margin - 1, 2 * _TICK) if width else total
    head = tail = 0
    parts = [window]
    if total > room:
        head = (room - len(_GAP) + 1) // 2
        tail = room - len(_GAP) - head
        parts = [
            Window(window.start, window.start + head / scale),
            Window(window.end - tail / scale, window.end),
        ]
    cuts = (head, total - tail) if head else ()
    lines = [''.join(_draw(timeline, row, scale, window, total, cuts)) for row in shown]
    lines.append(_axis(window, scale, total))
    if head:
        lines = [line[:head] + _GAP + line[total - tail :].ljust(tail) for line in lines]
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
    return (int(wide) + 1) / short if short < float('inf') else 1.0


def _name(row: Row) -> str:
    return f'rank {row.rank}' if row.name == COMPUTE_LANE else f'rank {row.rank} {row.name}'


def _draw(
    timeline: Timeline,
    row: Row,
    scale: float,
    window: Window,
    total: int,
    cuts: tuple[int, ...],
) -> list[str]:
    cells = ['.' if row.name == COMPUTE_LANE else ' '] * total
    for entry in row.entries:
        start = max(round((entry.start - window.start) * scale), 0)
        end = min(round((entry.end - window.start) * scale), total)
        if end <= start:
            continue
        text = label(timeline.plan, entry.op)
        if window.cuts(entry) and len(text) > end - start:
            text = ''
        text = text[: end - start]
        if any(start < cut < start + len(text) for cut in cuts):
            # Half a number would name another microbatch.
            text = ''
        # A space before the next operation, where the label leaves one.
        cells[start:end] = text.ljust(end - start - 1, '-').ljust(end - start)
    return cells


def _axis(window: Window, scale: float, total: int) -> str:
    step = 1.0
    while step * scale < _TICK:
        step *= 2
    line = ''
    for time in marks(window, step):
        longer = line.ljust(round((time - window.start) * scale)) + f'{time:g}'
        if len(longer) <= total:
            line = longer
    return line.ljust(total)


def _legend(timeline: Timeline) -> list[str]:
    plan = timeline.plan
    letters = 'B backward, I and W its halves (gradients of input and of weights), . idle'
    lines = [unit(timeline), notation(plan), letters]
    if most_chunks(plan) > 1:
        lines.append('; '.join(chunk_words(plan, chunk) for chunk in range(most_chunks(plan))))
    return lines
