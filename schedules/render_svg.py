"""A timeline as SVG, in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import (
    COLOURS,
    NAMES,
    label,
    rows,
    second_chunk,
    tick_step,
    title,
)
from megatron_mhc.schedules.timeline import COMPUTE_LANE, LANES, Entry, Timeline

# Pixels.
_ROW, _THIN_ROW, _GAP, _MARGIN, _TOP, _BOTTOM = 24, 12, 3, 86, 34, 58
_LETTER = 6.2
_SHORTEST = 20.0


def render_svg(timeline: Timeline, lanes: tuple[str, ...] = LANES) -> str:
    """The whole SVG file.

    An operation shows its label where that fits, and everything about it under the pointer; a
    rank's second chunk is darker.
    """
    scale = _pixels_per_unit(timeline)
    width = _MARGIN + timeline.makespan * scale + 12
    body, y, previous = [], _TOP, -1
    for row in rows(timeline, lanes):
        y += _GAP if row.rank == previous else 2 * _GAP
        previous = row.rank
        height = _ROW if row.name == COMPUTE_LANE else _THIN_ROW
        name = f'rank {row.rank}' if row.name == COMPUTE_LANE else row.name
        body.append(_text(_MARGIN - 6, y + height / 2 + 4, name, 'end'))
        for entry in row.entries:
            body.extend(_operation(timeline, entry, y, height, scale))
        y += height
    body.extend(_axis(timeline.makespan, scale, y + 6))
    body.extend(_legend(timeline, y + 40))
    return '\n'.join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y + _BOTTOM}" '
            f'viewBox="0 0 {width:.0f} {y + _BOTTOM}" font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            _text(8, 20, title(timeline), size=13),
            *body,
            '</svg>\n',
        ]
    )


def _pixels_per_unit(timeline: Timeline) -> float:
    times = [
        (entry.end - entry.start) / len(entry.op.leaves)
        for entry in timeline.entries
        if entry.lane == COMPUTE_LANE and entry.op.kind is not Kind.R and entry.end > entry.start
    ]
    return _SHORTEST / min(times, default=_SHORTEST)


def _operation(
    timeline: Timeline, entry: Entry, y: float, height: float, scale: float
) -> Iterator[str]:
    """One box; a fused slot has the colours of its parts side by side."""
    plan, x = timeline.plan, _MARGIN + entry.start * scale
    # What takes no time must still be seen.
    width = max((entry.end - entry.start) * scale, 1.0)
    yield f'<g><title>{escape(f"{entry.op}  {entry.start:.6g} to {entry.end:.6g}")}</title>'
    share = width / len(entry.op.leaves)
    for number, leaf in enumerate(entry.op.leaves):
        shade = ' fill-opacity="1"' if second_chunk(plan, leaf) else ' fill-opacity="0.6"'
        yield (
            f'<rect x="{x + number * share:.2f}" y="{y}" width="{share:.2f}" height="{height}" '
            f'fill="{COLOURS[leaf.kind]}"{shade}/>'
        )
    yield (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="none" '
        f'stroke="#444" stroke-width="{1.2 if entry.op.parts else 0.5}"/>'
    )
    text = label(plan, entry.op)
    if height == _ROW and len(text) * _LETTER <= width:
        yield _text(x + width / 2, y + height / 2 + 4, text, 'middle')
    yield '</g>'


def _axis(makespan: float, scale: float, y: float) -> Iterator[str]:
    yield f'<path d="M{_MARGIN} {y}H{_MARGIN + makespan * scale:.2f}" stroke="#444"/>'
    step = tick_step(makespan)
    for mark in range(int(makespan / step + 1e-9) + 1):
        x = _MARGIN + mark * step * scale
        yield f'<path d="M{x:.2f} {y}v4" stroke="#444"/>'
        yield _text(x, y + 15, f'{mark * step:g}', 'middle')


def _legend(timeline: Timeline, y: float) -> Iterator[str]:
    kinds = {leaf.kind for entry in timeline.entries for leaf in entry.op.leaves}
    x = _MARGIN
    for kind, colour in COLOURS.items():
        if kind not in kinds:
            continue
        yield (
            f'<rect x="{x}" y="{y - 9}" width="12" height="12" fill="{colour}" stroke="#444" '
            'stroke-width="0.5"/>'
        )
        text = f'{kind} {NAMES[kind]}'
        yield _text(x + 16, y + 1, text)
        x += 30 + len(text) * 6


def _text(x: float, y: float, text: str, anchor: str = 'start', size: int = 11) -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}">'
        f'{escape(text)}</text>'
    )
