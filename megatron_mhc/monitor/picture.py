"""A report as one picture: png, svg or pdf."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from megatron_mhc.monitor.curves import Groups, drawn_panels
from megatron_mhc.monitor.draw import draw_panel, plain
from megatron_mhc.monitor.heat_maps import (
    ENTRIES_HEIGHT,
    MAPS_HEIGHT,
    WIDTH,
    draw_entries,
    draw_maps,
)
from megatron_mhc.monitor.runs import Run

COLUMNS = 3
# Of a verdict on a line.
CHARACTERS = 150


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that lays itself out.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'the page needs matplotlib, which is not installed; pip install matplotlib'
        ) from error
    figure = Figure(figsize=(width, height), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def write_picture(
    output: Path, groups: Groups, lines: list[str], mapped: list[tuple[Run, list[int]]]
) -> None:
    """Draw everything on one page; the format follows from the name of ``output``.

    Args:
        lines: the verdicts.
        mapped: the runs whose maps are drawn, and the sublayers of each.
    """
    wrapper = textwrap.TextWrapper(CHARACTERS, subsequent_indent='  ')
    wrapped = [part for line in lines for part in wrapper.wrap(line)]
    panels = drawn_panels(groups)
    rows = -(-len(panels) // COLUMNS)
    maps = max((len(numbers) for _, numbers in mapped), default=0)
    map_heights = [MAPS_HEIGHT, ENTRIES_HEIGHT] * len(mapped)
    heights = [0.3 + 0.2 * len(wrapped), 3.0 * rows, *map_heights]
    figure = new_figure(max(16, WIDTH * maps), sum(heights))
    head, curve_part, *map_parts = figure.subfigures(
        len(heights), 1, height_ratios=heights, squeeze=False
    )[:, 0]
    head.text(0.01, 0.5, plain('\n'.join(wrapped)), fontsize=9, family='monospace', va='center')
    every = list(curve_part.subplots(rows, COLUMNS, squeeze=False).flat)
    for (panel, found), axes in zip(panels, every, strict=False):
        draw_panel(axes, panel, found, groups)
    for axes in every[len(panels) :]:
        axes.remove()
    for (run, numbers), drawn, entries in zip(mapped, map_parts[::2], map_parts[1::2], strict=True):
        draw_maps(drawn, run, numbers)
        draw_entries(entries, run, numbers)
    figure.savefig(output)
