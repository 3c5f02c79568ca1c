"""A timeline as boxes and words in pixels, and those as SVG, in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import inf
from typing import NamedTuple

from megatron_mhc.schedules.plan import Kind, Plan
from megatron_mhc.schedules.render_rows import (
    COLOURS,
    NAMES,
    Row,
    chunk_of,
    chunk_words,
    drawn_rows,
    figures,
    label,
    lane_words,
    marks,
    most_chunks,
    notation,
    tick_step,
    title,
    unit,
)
from megatron_mhc.schedules.render_window import (
    FINEST,
    MOST_WIDE,
    Window,
    excerpt,
    panels,
    window_of,
)
from megatron_mhc.schedules.timeline import COMPUTE_LANE, LANES, Entry, Timeline

# Pixels.
_ROW, _THIN_ROW, _GAP, _MARGIN, _EDGE, _LINE, _BREAK = 24, 12, 3, 86, 12, 18, 34
_LETTER = 6.2
_SHORTEST = 20.0
INK, IDLE = '#444', '#f0f0f0'


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

    @property
    def right(self) -> float:
        """Where the text ends, about."""
        beyond = {'start': 1.0, 'middle': 0.5, 'end': 0.0}[self.anchor]
        return self.x + beyond * len(self.text) * _LETTER * self.size / 11


class Panel(NamedTuple):
    """A stretch of time, drawn from the pixel ``left`` on, ``scale`` pixels a unit."""

    window: Window
    left: float
    scale: float

    def x(self, time: float) -> float:
        """The pixel of ``time``, of the nearer end where it is outside."""
        start, end = self.window
        return self.left + (min(max(time, start), end) - start) * self.scale


def render_svg(
    timeline: Timeline,
    lanes: tuple[str, ...] = LANES,
    window: Window | None = None,
    widest: float = inf,
) -> str:
    """The whole SVG file, with everything about an operation under the pointer; see ``draw``."""
    width, height, shapes = draw(timeline, lanes, window, widest)
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
    timeline: Timeline,
    lanes: tuple[str, ...] = LANES,
    window: Window | None = None,
    widest: float = inf,
) -> tuple[float, float, list[Box | Words]]:
    """The picture of ``timeline``: its width, its height, and shapes from the back to the front.

    An operation shows its label where that fits; later chunks of a rank are darker. What would be
    more than ``widest`` pixels wide, or ``MOST_WIDE``, loses its middle, and says so.

    Args:
        timeline: from ``simulate``.
        lanes: which lanes.
        window: a part of the step; None for all of it.
        widest: pixels, but never less than the words around the boxes need.
    """
    placed = _placed(timeline, window or window_of(timeline), widest)
    shown = Window(placed[0].window.start, placed[-1].window.end)
    right = placed[-1].x(shown.end)
    head = [title(timeline), figures(timeline), excerpt(timeline, [p.window for p in placed])]
    shapes: list[Box | Words] = [
        Words(8, 20 + number * _LINE, text, size=11 if number else 14)
        for number, text in enumerate(filter(None, head))
    ]
    y, previous = 8.0 + len(shapes) * _LINE, -1
    top = y
    drawn = drawn_rows(timeline, lanes, shown)
    for row in drawn:
        y += _GAP if row.rank == previous else 2 * _GAP
        previous = row.rank
        height = _ROW if row.name == COMPUTE_LANE else _THIN_ROW
        name = lane_words(row) or f'rank {row.rank}'
        shapes.append(Words(_MARGIN - 6, y + height / 2 + 4, name, 'end'))
        for panel in placed:
            if row.name == COMPUTE_LANE:
                width = panel.window.length * panel.scale
                shapes.append(Box(panel.left, y, width, height, IDLE))
            for entry in filter(panel.window.shows, row.entries):
                shapes.extend(_operation(timeline.plan, entry, panel, y, height))
        y += height
    for before in placed[:-1]:
        x = before.x(before.window.end) + _BREAK / 2
        shapes.append(Words(x, (top + y) / 2 + 8, '~~', 'middle', 18))
    shapes.extend(_axis(placed, shown, y + 6))
    shapes.append(Words(_MARGIN, y + 40, unit(timeline)))
    y += 40 + _LINE
    for line in _legend(timeline.plan, drawn, y):
        shapes.extend(line)
        y += _LINE
    words = (shape.right for shape in shapes if isinstance(shape, Words))
    return max(right, *words) + _EDGE, y, shapes


def _placed(timeline: Timeline, window: Window, widest: float) -> list[Panel]:
    """The parts of ``window`` that fit, side by side."""
    scale = _pixels_per_unit(timeline)
    # Half of the last number on the axis as well.
    room = min(widest, MOST_WIDE) - _MARGIN - 2 * _EDGE
    if window.length * scale > room:
        room = max(room - _BREAK, 4 * _SHORTEST)
    found, left = [], float(_MARGIN)
    for part in panels(window, room / scale):
        found.append(Panel(part, left, scale))
        left += part.length * scale + _BREAK
    return found


def _pixels_per_unit(timeline: Timeline) -> float:
    """So many that labels fit."""
    wide, short = _SHORTEST, inf
    for entry in timeline.entries:
        if entry.lane == COMPUTE_LANE and entry.op.kind is not Kind.R and entry.end > entry.start:
            parts = len(entry.op.leaves)
            wide = max(wide, (len(label(timeline.plan, entry.op)) * _LETTER + 5) / parts)
            short = min(short, (entry.end - entry.start) / parts)
    return wide / max(short, timeline.makespan * FINEST) if short < inf else 1.0


def _shade(plan: Plan, chunk: int) -> float:
    """The opacity of a chunk's colours: the more, the later its stages are."""
    most = most_chunks(plan)
    return 0.45 + 0.55 * chunk / (most - 1) if most > 1 else 0.75


def _operation(
    plan: Plan, entry: Entry, panel: Panel, y: float, height: float
) -> Iterator[Box | Words]:
    """One box; a fused slot has the colours of its parts side by side."""
    x = panel.x(entry.start)
    # What takes no time must still be seen.
    width = max(panel.x(entry.end) - x, 1.0)
    leaves = entry.op.leaves
    for number, leaf in enumerate(leaves):
        part = (entry.end - entry.start) / len(leaves)
        start = panel.x(entry.start + number * part)
        end = panel.x(entry.start + (number + 1) * part) if part else start + width
        if end > start:
            shade = _shade(plan, chunk_of(plan, leaf))
            yield Box(start, y, end - start, height, COLOURS[leaf.kind], shade)
    text = label(plan, entry.op)
    if height == _ROW and len(text) * _LETTER <= width:
        yield Words(x + width / 2, y + height / 2 + 4, text, 'middle')
    about = f'{entry.op}  {entry.start:.6g} to {entry.end:.6g}'
    yield Box(x, y, width, height, line=1.2 if entry.op.parts else 0.5, about=about)


def _axis(placed: list[Panel], shown: Window, y: float) -> Iterator[Box | Words]:
    drawn = sum(panel.window.length for panel in placed)
    # One mark in about 90 pixels.
    step = tick_step(drawn, max(4, int(drawn * placed[0].scale / 90)))
    for panel in placed:
        yield Box(panel.left, y, panel.window.length * panel.scale, 1, INK)
        for time in marks(panel.window, step):
            yield Box(panel.x(time), y, 1, 4, INK)
            yield Words(panel.x(time), y + 15, f'{time:g}', 'middle')


def _legend(plan: Plan, drawn: list[Row], y: float) -> Iterator[list[Box | Words]]:
    """Lines: colours of what is seen, shades of chunks, letters."""
    kinds = {leaf.kind for row in drawn for entry in row.entries for leaf in entry.op.leaves}
    plain = _shade(plan, most_chunks(plan) - 1)
    cells = [(c, plain, f'{k} {NAMES[k]}') for k, c in COLOURS.items() if k in kinds]
    yield _swatches([*cells, (IDLE, 1.0, 'idle')], y)
    if most_chunks(plan) > 1:
        y += _LINE
        shades = range(most_chunks(plan))
        yield _swatches(
            [(COLOURS[Kind.F], _shade(plan, c), chunk_words(plan, c)) for c in shades], y
        )
    yield [Words(_MARGIN, y + _LINE + 1, notation(plan))]


def _swatches(cells: list[tuple[str, float, str]], y: float) -> list[Box | Words]:
    found: list[Box | Words] = []
    x = float(_MARGIN)
    for colour, shade, text in cells:
        words = Words(x + 16, y + 1, text)
        found += [Box(x, y - 9, 12, 12, colour, shade, line=0.5), words]
        x = words.right + 14
    return found


def _box(box: Box) -> str:
    look = f'fill="{box.fill}"' + f' fill-opacity="{box.opacity:.3g}"' * (box.opacity != 1)
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
