"""The picture of all layouts: step time against memory, and where the time of the best goes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_mhc.sizing.memory import USABLE
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.points import Point, Study, best_of, breakdown, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = {
    'compute': 'tab:blue',
    'bubble': 'lightgray',
    'pipeline hops': 'tab:orange',
    'tensor parallel': 'tab:purple',
    'context parallel': 'tab:pink',
    'expert all-to-all': 'tab:red',
    'data parallel': 'tab:brown',
    'optimizer': 'tab:green',
}
# Of the numbers of streams, in turn.
MARKERS = 'o^sDvP'
STYLES = ('-', '--', ':', '-.')


def picture(study: Study, hardware: Hardware, title: str) -> bytes:
    """PNG: step time against memory of all points, and where the time of the best ones goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10, parse_math=False)
    counts = sorted({point.layout.gpus for point in study.points})
    scatter(left, study, counts)
    limit = USABLE * hardware.memory_gib
    words = f'{USABLE:.0%} of {hardware.name}, {limit:.0f} GiB'
    left.axvline(limit, color='gray', ls='--', lw=1, label=words)
    key = left.legend(
        **{'fontsize': 7, 'title_fontsize': 7, 'ncol': 5, 'frameon': False},
        title='line: no layout that fits is better',
        loc='lower center',
        bbox_to_anchor=(0.5, 1.0),
    )
    for text in key.get_texts():
        text.set_parse_math(False)
    _bars(right, study, counts)
    file = io.BytesIO()
    canvas.print_figure(file, format='png', dpi=90)
    return file.getvalue()


def scatter(axes: Axes, study: Study, counts: list[int]) -> None:
    """A cloud for each number of GPUs, or for each schedule where there is one number.

    Every number of GPUs and n has the line of its Pareto front.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from matplotlib.ticker import LogLocator, NullFormatter

    several = len(counts) > 1
    name: Callable[[Point], str] = (
        (lambda point: f'{point.layout.gpus} GPUs') if several else (lambda p: p.schedule_name)
    )
    names = list(dict.fromkeys(map(name, sorted(study.points, key=lambda p: p.layout.gpus))))
    if not several:
        names.sort()
    # From violet to yellow by GPUs, which have an order; schedules have none.
    shades = colormaps['turbo' if several else 'tab10']
    span = max(1, len(names) - 1)
    colours = {
        one: to_hex(shades(0.05 + 0.9 * i / span) if several else shades(i))
        for i, one in enumerate(names)
    }
    for number, (n, points) in enumerate(study.streams.items()):
        for one in names:
            mine = [point for point in points if name(point) == one]
            axes.scatter(
                [p.memory_gib for p in mine],
                [p.step_s for p in mine],
                s=8,
                color=colours[one],
                marker=MARKERS[number % len(MARKERS)],
                alpha=0.5,
                # Colours in the key once, and markers once.
                label='_' * bool(number) + one,
            )
        if len(study.streams) > 1:
            style = STYLES[number % len(STYLES)]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([], [], color='gray', marker=marker, ls=style, ms=4, label=f'n = {n}')
        for gpus in counts:
            front = pareto(point for point in points if point.layout.gpus == gpus)
            front.sort(key=lambda point: point.memory_gib)
            axes.plot(
                [p.memory_gib for p in front],
                [p.step_s for p in front],
                color=colours[f'{gpus} GPUs'] if several else 'black',
                ls=STYLES[number % len(STYLES)],
                lw=1.2,
            )
    axes.set(xscale='log', yscale='log', ylabel='step time, s')
    axes.set_xlabel('memory of the fullest rank, GiB')
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter('{x:g}')
        axis.set_minor_formatter(NullFormatter())


def _bars(axes: Axes, study: Study, counts: list[int]) -> None:
    """Parts of a step: of the best layout of every number of GPUs, or else of every schedule."""
    several = len(counts) > 1
    groups: dict[str, list[Point]] = {}
    for point in study.points:
        size = f'{point.layout.gpus} GPUs, {point.schedule_name}'
        groups.setdefault(str(point.layout.gpus) if several else size, []).append(point)
    chosen = [
        best_of(points) or min(points, key=lambda point: point.memory_gib)
        for points in groups.values()
    ]
    order = (lambda p: -p.layout.gpus) if several else (lambda p: -p.step_s)
    chosen.sort(key=order)
    labels = [bar_label(point) for point in chosen]
    start = [0.0] * len(chosen)
    for part, colour in PARTS.items():
        scales = [100 / point.step_s if several else 1.0 for point in chosen]
        values = [breakdown(p)[part] * scale for p, scale in zip(chosen, scales, strict=True)]
        if any(values):
            axes.barh(labels, values, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.tick_params(axis='y', labelsize=7)
    axes.set_xlabel('share of the step, %' if several else 'step time, s')
    axes.legend(fontsize=7, ncol=4, loc='lower center', bbox_to_anchor=(0.4, 1.0), frameon=False)


def bar_label(point: Point) -> str:
    """What a bar stands for: two lines."""
    layout = point.layout
    cp = f' cp {layout.cp}' if layout.cp > 1 else ''
    ranks = f'tp {layout.tp}{cp} pp {layout.pp} ep {layout.ep} b {layout.micro_batch}'
    fits = '' if point.fits else ', does not fit'
    return f'{layout.gpus} GPUs, n {point.streams}, {point.schedule_name}\n{ranks}{fits}'
