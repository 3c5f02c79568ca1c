"""A timeline as PNG: the picture of the SVG, by matplotlib where that is installed."""

from __future__ import annotations

import io

from megatron_mhc.schedules.render_svg import INK, Box, draw
from megatron_mhc.schedules.timeline import Timeline

# Pixels of the PNG for one of the SVG, and a side that viewers still open.
_SHARPNESS, _LARGEST = 1.5, 30_000
_DPI = 100
_SIDES = {'start': 'left', 'middle': 'center', 'end': 'right'}


def render_png(timeline: Timeline) -> bytes:
    """The PNG file.

    Raises:
        RuntimeError: matplotlib is not installed.
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
    width, height, shapes = draw(timeline, widest=_LARGEST / _SHARPNESS)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_SHARPNESS * _DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
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
