"""A timeline as boxes and words in pixels, and those as SVG, in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import inf
from typing import NamedTuple

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
INK = '#444'


class Box(NamedTuple):
    """A rectangle; ``line`` is the width of its border, ``about`` is shown under the pointer."""

    x: float
    y: float
    width: float
    height: float
    fill: str = 'none'
    opacity: float = 1.0
    line: float = 0.0
    about: str = ''


class Words(NamedTuple):
    """A line of text; ``anchor`` says which end of it, or its middle, is at ``x``."""

    x: float
    y: float
    text: str
    anchor: str = 'start'
    size: int = 11


def render_svg(timeline: Timeline, lanes: tuple[str, ...] = LANES) -> str:
    """The whole SVG file, with everything about an operation under the pointer."""
    width, height, shapes = draw(timeline, lanes)
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    return '\n'.join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
            '<rect width="100%" height="100%" fill="white"/>',
            *(_box(shape) if isinstance(shape, Box) else _words(shape) for shape in shapes),
            '</svg>\n',
        ]
    )


def draw(
    timeline: Timeline, lanes: tuple[str, ...] = LANES, widest: float = inf
) -> tuple[float, float, list[Box | Words]]:
    """The picture of ``timeline``: its width, its height, and shapes from the back to the front.

    An operation shows its label where that fits; a rank's second chunk is darker. Where the step
    would be more than ``widest`` pixels wide, it is drawn smaller.
    """
    scale = _pixels_per_unit(timeline)
    if timeline.makespan:
        scale = min(scale, (widest - _MARGIN - 12) / timeline.makespan)
    shapes: list[Box | Words] = [Words(8, 20, title(timeline), size=13)]
    y, previous = _TOP, -1
    for row in rows(timeline, lanes):
        y += _GAP if row.rank == previous else 2 * _GAP
        previous = row.rank
        height = _ROW if row.name == COMPUTE_LANE else _THIN_ROW
        name = f'rank {row.rank}' if row.name == COMPUTE_LANE else row.name
        shapes.append(Words(_MARGIN - 6, y + height / 2 + 4, name, 'end'))
        for entry in row.entries:
            shapes.extend(_operation(timeline, entry, y, height, scale))
        y += height
    shapes.extend(_axis(timeline.makespan, scale, y + 6))
    shapes.extend(_legend(timeline, y + 40))
    ends = (s.x + len(s.text) * _LETTER for s in shapes if isinstance(s, Words))
    width = max(_MARGIN + timeline.makespan * scale, *ends) + 12
    return width, y + _BOTTOM, shapes


def _pixels_per_unit(timeline: Timeline) -> float:
    times = [
        (entry.end - entry.start) / len(entry.op.leaves)
        for entry in timeline.entries
        if entry.lane == COMPUTE_LANE and entry.op.kind is not Kind.R and entry.end > entry.start
    ]
    return _SHORTEST / min(times, default=_SHORTEST)


def _operation(
    timeline: Timeline, entry: Entry, y: float, height: float, scale: float
) -> Iterator[Box | Words]:
    """One box; a fused slot has the colours of its parts side by side."""
    plan, x = timeline.plan, _MARGIN + entry.start * scale
    # What takes no time must still be seen.
    width = max((entry.end - entry.start) * scale, 1.0)
    share = width / len(entry.op.leaves)
    for number, leaf in enumerate(entry.op.leaves):
        shade = 1.0 if second_chunk(plan, leaf) else 0.6
        yield Box(x + number * share, y, share, height, COLOURS[leaf.kind], shade)
    text = label(plan, entry.op)
    if height == _ROW and len(text) * _LETTER <= width:
        yield Words(x + width / 2, y + height / 2 + 4, text, 'middle')
    about = f'{entry.op}  {entry.start:.6g} to {entry.end:.6g}'
    yield Box(x, y, width, height, line=1.2 if entry.op.parts else 0.5, about=about)


def _axis(makespan: float, scale: float, y: float) -> Iterator[Box | Words]:
    yield Box(_MARGIN, y, makespan * scale, 1, INK)
    step = tick_step(makespan)
    for mark in range(int(makespan / step + 1e-9) + 1):
        x = _MARGIN + mark * step * scale
        yield Box(x, y, 1, 4, INK)
        yield Words(x, y + 15, f'{mark * step:g}', 'middle')


def _legend(timeline: Timeline, y: float) -> Iterator[Box | Words]:
    kinds = {leaf.kind for entry in timeline.entries for leaf in entry.op.leaves}
    x = _MARGIN
    for kind, colour in COLOURS.items():
        if kind in kinds:
            text = f'{kind} {NAMES[kind]}'
            yield Box(x, y - 9, 12, 12, colour, line=0.5)
            yield Words(x + 16, y + 1, text)
            x += 30 + len(text) * 6


def _box(box: Box) -> str:
    look = f'fill="{box.fill}"' + f' fill-opacity="{box.opacity}"' * (box.opacity != 1)
    if box.line:
        look += f' stroke="{INK}" stroke-width="{box.line}"'
    start = (
        f'<rect x="{box.x:.2f}" y="{box.y}" width="{box.width:.2f}" height="{box.height}" {look}'
    )
    if not box.about:
        return f'{start}/>'
    return f'{start} pointer-events="all"><title>{escape(box.about)}</title></rect>'


def _words(words: Words) -> str:
    return (
        f'<text x="{words.x:.2f}" y="{words.y:.2f}" text-anchor="{words.anchor}" '
        f'font-size="{words.size}">{escape(words.text)}</text>'
    )
