"""A timeline as PNG: the picture of the SVG, by matplotlib where that is installed."""

from __future__ import annotations

import io

from megatron_mhc.schedules.render_svg import INK, Box, draw
from megatron_mhc.schedules.render_window import Window
from megatron_mhc.schedules.timeline import LANES, Timeline

# Pixels of the PNG for one of the SVG, a side that viewers still open, and a width that shows on a
# screen as it is.
_SHARPNESS, _LARGEST, WIDTH = 1.5, 30_000, 2400
_DPI = 100
_SIDES = {'start': 'left', 'middle': 'center', 'end': 'right'}


def render_png(timeline: Timeline, window: Window | None = None, width: int = WIDTH) -> bytes:
    """The PNG file.

    Args:
        timeline: from ``simulate``.
        window: a part of the step; None for all of it.
        width: pixels; a longer step shows its beginning and its end. 0 for all that fits in a file.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: so many ranks that the picture is too high.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'a PNG needs matplotlib, which is not installed; pip install matplotlib, '
            'or take --format svg'
        ) from error
    widest = min(width or _LARGEST, _LARGEST) / _SHARPNESS
    across, down, shapes = draw(timeline, LANES, window, widest)
    if (high := round(down * _SHARPNESS)) > _LARGEST:
        raise ValueError(
            f'argument --format png: {high} pixels high, at most {_LARGEST}; take --format svg'
        )
    figure = Figure(figsize=(across / _DPI, down / _DPI), dpi=_SHARPNESS * _DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(down, 0))
    axes.set_axis_off()
    boxes = [shape for shape in shapes if isinstance(shape, Box)]
    # All in one call: a call each takes minutes for a long step.
    collection = PolyCollection(
        [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h, *_ in boxes],
        facecolors=[to_rgba(b.fill, 0 if b.fill == 'none' else b.opacity) for b in boxes],
        edgecolors=INK,
        linewidths=[b.line * 72 / _DPI for b in boxes],
    )
    axes.add_collection(collection)
    for shape in shapes:
        if not isinstance(shape, Box):
            x, y, text, anchor, size = shape
            # matplotlib's letters are wider than a browser's; a dollar sign would begin a formula.
            points = 0.9 * size * 72 / _DPI
            axes.text(x, y, text, ha=_SIDES[anchor], fontsize=points, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return file.getvalue()
