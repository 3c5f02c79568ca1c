"""H_res of some sublayers of one run: mean maps as heat-maps, and its entries while training."""

from __future__ import annotations

from typing import Any

from megatron_mhc.monitor.draw import FEW_POINTS, extent, plain
from megatron_mhc.monitor.finding import Finding
from megatron_mhc.monitor.names import FEW_STREAMS, sublayer_name
from megatron_mhc.monitor.runs import Run, present

# Up to it the scale of maps is linear: hc's single maps, and columns that have not converged.
LINEAR = 2
# Inches: of each sublayer; of both rows of maps, and of entries.
WIDTH, MAPS_HEIGHT, ENTRIES_HEIGHT = 3.2, 5.4, 2.8
HEALTHY_MAPS = (
    'Row and column sums, along the edges, are 1 for mhc. All entries 1/n: mixing without '
    'preference; a diagonal near 1: streams that keep to themselves.'
)
HEALTHY_ENTRIES = (
    'mhc: between 0 and 1, moving slowly. Solid: the diagonal, dashed: the others, in the colour '
    f'of their row; above {FEW_STREAMS} streams the diagonal alone.'
)


def chosen_sublayers(run: Run, wanted: list[int] | None, found: list[Finding]) -> list[int]:
    """The sublayers of the maps: those asked for, else first, middle, last, and any in trouble.

    Raises:
        ValueError: a number that the run does not have.
    """
    length = len(run.composite)
    for sublayer in wanted or ():
        if not 0 <= sublayer < length:
            raise ValueError(
                f'--sublayers {sublayer}: {run.label} has sublayers 0 to {length - 1}, two a '
                'layer: attention, then MLP; take one of those'
            )
        if sublayer not in present(run):
            name = sublayer_name(sublayer, run.pattern)
            raise ValueError(
                f'--sublayers {sublayer}: {run.label} has no {name}, as a layer of a hybrid model '
                'has one sublayer; take the other one'
            )
    trouble = {finding.sublayer for finding in found if finding.sublayer is not None}
    there = present(run) or range(length)
    return wanted or sorted({there[0], there[len(there) // 2], there[-1]} | trouble)


def draw_maps(figure: Any, run: Run, sublayers: list[int]) -> None:
    """Single maps, below them composites, each row with a scale to its largest entry."""
    assert run.iteration is not None
    last, h_res = len(run.composite) - 1, run.h_res[run.iteration]
    single = [(f'H_res[{number}]', h_res[number]) for number in sublayers]
    # From the last one on, the composite is the single map.
    products = [
        (f'H_res[{last}] ... H_res[{number}]', run.composite[number])
        for number in sublayers
        if number < last
    ]
    figure.suptitle(f'{plain(run.label)}, iteration {run.iteration}: mean maps', fontsize=9)
    rows = [drawn for drawn in (single, products) if drawn]
    axes = figure.subplots(len(rows), len(single), squeeze=False)
    for drawn, row in zip(rows, axes, strict=True):
        panels = row[: len(drawn)]
        for unused in row[len(drawn) :]:
            unused.remove()
        norm = _scale([matrix for _, matrix in drawn])
        for panel, (title, matrix) in zip(panels, drawn, strict=True):
            image = _draw_map(panel, title, matrix, norm)
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
        # A logarithmic one would have a tick each decade.
        ticks = [-norm.vmax, 0, norm.vmax]
        bar.set_ticks(ticks, labels=[f'{tick:.2g}' for tick in ticks], fontsize=6)
        bar.minorticks_off()
        beyond = ', log beyond 1' if norm.vmax > LINEAR else ''
        bar.set_label(f'mean entry{beyond}', fontsize=7)


def _scale(matrices: list[Any]) -> Any:
    """-1 to 1; beyond, as far as the entries reach, logarithmic from 1 on."""
    import numpy
    from matplotlib.colors import Normalize, SymLogNorm

    entries = numpy.abs(numpy.stack(matrices))
    most = float(numpy.max(entries, initial=0, where=numpy.isfinite(entries)))
    if most <= LINEAR:
        return Normalize(-max(1.0, most), max(1.0, most))
    return SymLogNorm(linthresh=1, vmin=-most, vmax=most, base=10)


def _draw_map(panel: Any, title: str, matrix: Any, norm: Any) -> Any:
    # Sums of large entries are beyond fp32.
    matrix = matrix.astype(float)
    image = panel.imshow(matrix, cmap='RdBu_r', norm=norm)
    panel.set_title(title, fontsize=8)
    if len(matrix) <= 2 * FEW_STREAMS:
        for (i, j), value in ((at, matrix[at]) for at in _places(len(matrix))):
            colour = 'white' if abs(norm(value) - 0.5) > 0.3 else 'black'
            panel.text(j, i, f'{value:.3g}', ha='center', va='center', fontsize=6, color=colour)
    every = range(len(matrix))
    panel.set_yticks(every, [f'{value:.3g}' for value in matrix.sum(1)], fontsize=6)
    rotation = 0 if len(matrix) <= FEW_STREAMS else 90
    columns = [f'{value:.3g}' for value in matrix.sum(0)]
    panel.set_xticks(every, columns, fontsize=6, rotation=rotation)
    panel.set_xlabel('column sums', fontsize=7)
    panel.set_ylabel('row sums', fontsize=7)
    return image


def _places(streams: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(streams) for j in range(streams)]


def draw_entries(figure: Any, run: Run, sublayers: list[int]) -> None:
    """Single entries of H_res, mean over the tokens, at every report."""
    steps, streams = list(run.h_res), run.composite.shape[-1]
    places = [(i, j) for i, j in _places(streams) if i == j or streams <= FEW_STREAMS]
    marker = '.' if len(steps) <= FEW_POINTS else None
    figure.suptitle(f'{plain(run.label)}: entries of H_res, mean over tokens', fontsize=9)
    panels = figure.subplots(1, len(sublayers), squeeze=False, sharey=True)[0]
    values = [0.0, 1.0]
    for panel, number in zip(panels, sublayers, strict=True):
        for i, j in places:
            points = [float(run.h_res[step][number, i, j]) for step in steps]
            style, label = ('-', f'[{i}, {i}]') if i == j else ('--', None)
            panel.plot(
                steps, points, style, color=f'C{i % 10}', lw=1, marker=marker, ms=3, label=label
            )
            values += points
        panel.set_title(f'H_res[{number}]', fontsize=8)
        panel.set_xlabel('iteration')
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('entry')
    if streams <= 2 * FEW_STREAMS:
        panels[-1].legend(fontsize=6)
    finite = [value for value in values if abs(value) < float('inf')]
    panels[0].set_ylim(*extent(finite, log=False))
