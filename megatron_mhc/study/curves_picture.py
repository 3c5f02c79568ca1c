"""The picture of scaling curves: tokens a second and GPU, and efficiency, against GPUs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from megatron_mhc.study.picture import MARKERS, STYLES
from megatron_mhc.study.scaling import BEST, ENOUGH, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curves_picture(curves: list[Curve], title: str) -> bytes:
    """PNG: a row for each kind of scaling; a colour for each schedule, a style for each n."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(curve.mode for curve in curves))
    figure = Figure(figsize=(12, 4.2 * len(modes)), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False)
    for mode, row in zip(modes, figure.subplots(len(modes), 2, squeeze=False), strict=True):
        mine = [curve for curve in curves if curve.mode == mode]
        for axes, efficiency in zip(row, (False, True), strict=True):
            _draw(axes, mine, efficiency)
            _scale(axes, mine)
        batch = 'the same batch' if mode == 'strong' else 'a batch that grows with the GPUs'
        row[0].set(title=f'{mode} scaling: {batch}', ylabel='tokens a second and GPU')
        row[1].set(title='efficiency; ring: the knee', ylabel='efficiency, %')
        row[1].axhline(100 * ENOUGH, color='gray', ls='--', lw=1)
        row[1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False)
    file = io.BytesIO()
    canvas.print_figure(file, format='png', dpi=90)
    return file.getvalue()


def _draw(axes: Axes, curves: list[Curve], efficiency: bool) -> None:
    schedules = sorted({curve.schedule for curve in curves} - {BEST})
    streams = sorted({curve.streams for curve in curves})
    for curve in curves:
        best, number = curve.schedule == BEST, streams.index(curve.streams)
        colour = 'black' if best else f'C{schedules.index(curve.schedule)}'
        values = [
            100 * curve.efficiency(point) if efficiency else point.tokens_per_gpu_s
            for point in curve.points
        ]
        axes.plot(
            [point.layout.gpus for point in curve.points],
            values,
            color=colour,
            ls=STYLES[number % len(STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            lw=2 if best else 1,
            ms=3,
            zorder=1 if best else 2,
            label=f'n = {curve.streams}, {curve.schedule}',
        )
        knee = curve.knee
        if efficiency and knee is not None and best:
            axes.plot(
                *(knee.point.layout.gpus, 100 * knee.efficiency),
                *('o',),
                mec=colour,
                mfc='none',
                ms=11,
            )
            axes.annotate(
                knee.cause,
                (knee.point.layout.gpus, 100 * knee.efficiency),
                xytext=(8, 8),
                textcoords='offset points',
                fontsize=8,
            )


def _scale(axes: Axes, curves: list[Curve]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    counts = sorted({point.layout.gpus for curve in curves for point in curve.points})
    axes.set(xscale='log', xlabel='GPUs')
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter('{x:g}')
    axes.tick_params(axis='x', labelsize=8, rotation=45 if len(counts) > 6 else 0)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
