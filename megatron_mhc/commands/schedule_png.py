"""A timeline as PNG, by matplotlib where that is installed."""

from __future__ import annotations

import io

from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import (
    COLOURS,
    NAMES,
    label,
    rows,
    second_chunk,
    title,
)
from megatron_mhc.schedules.timeline import COMPUTE_LANE, Timeline

# Pixels a side that viewers still open.
_LARGEST = 30_000
_DPI = 100


def render_png(timeline: Timeline) -> bytes:
    """The PNG file.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'a PNG needs matplotlib, which is not installed; pip install matplotlib, '
            'or take --format svg'
        ) from error
    shown = rows(timeline)
    drawn = [entry for row in shown for entry in row.entries]
    short = min(
        (
            (entry.end - entry.start) / len(entry.op.leaves)
            for entry in drawn
            if entry.op.kind is not Kind.R
            and entry.lane == COMPUTE_LANE
            and entry.end > entry.start
        ),
        default=1.0,
    )
    inches = min(max(timeline.makespan / short * 0.28, 8.0) + 1.5, _LARGEST / _DPI)
    figure = Figure(figsize=(inches, 0.3 * len(shown) + 1.4), dpi=_DPI, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Points that one unit of time is wide: what a label must fit in.
    unit = (inches - 1.5) * 72 / max(timeline.makespan, short)
    for line, row in enumerate(shown):
        # One call for all boxes of a look: a call each takes minutes for a long step.
        boxes: dict[tuple, list] = {}
        for entry in row.entries:
            whole = entry.start, entry.end - entry.start
            edge = ('none', 1.0, 1.2 if entry.op.parts else 0.5)
            boxes.setdefault(edge, []).append(whole)
            part = whole[1] / len(entry.op.leaves)
            for number, leaf in enumerate(entry.op.leaves):
                look = COLOURS[leaf.kind], 1.0 if second_chunk(timeline.plan, leaf) else 0.6, 0
                boxes.setdefault(look, []).append((entry.start + number * part, part))
            text = label(timeline.plan, entry.op)
            if len(text) * 4.5 <= whole[1] * unit:
                middle = entry.start + whole[1] / 2
                axes.text(middle, line, text, ha='center', va='center', fontsize=7, clip_on=True)
        for (face, alpha, edge), spans in boxes.items():
            style = {'facecolors': face, 'alpha': alpha, 'linewidth': edge, 'edgecolors': '#444'}
            axes.broken_barh(spans, (line - 0.42, 0.84), zorder=2 if edge else 1, **style)
    axes.set_yticks(
        range(len(shown)),
        [f'rank {r.rank}' if r.name == COMPUTE_LANE else r.name for r in shown],
    )
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_xlabel('time')
    axes.set_title(title(timeline), loc='left', fontsize=10)
    kinds = {leaf.kind for entry in drawn for leaf in entry.op.leaves}
    axes.legend(
        handles=[
            Patch(color=colour, label=f'{kind} {NAMES[kind]}')
            for kind, colour in COLOURS.items()
            if kind in kinds
        ],
        loc='upper left',
        bbox_to_anchor=(0, -0.6 / len(shown) - 0.08),
        ncols=8,
        fontsize=8,
        frameon=False,
    )
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return file.getvalue()
