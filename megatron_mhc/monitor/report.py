"""``megatron-mhc report``: loss, gradient norm, gains and mean H_res of monitored runs, one page.

Laid out as the mHC paper's figures: loss, its gap to the first run and gradient norm (5), amax gain
of single and composite H_res by sublayer (3, 7), maps as heat-maps with their row and column sums
(8). The numbers come from TensorBoard events, those of maps from ``--mhc-monitor``; a run without
it, such as a standard one to compare with, is drawn as far as it goes.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NamedTuple

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.monitor.events import LOSS, read_events, scalars

GRADIENT_NORM = 'grad-norm'
H_RES, COMPOSITE, GAINS = 'mhc/h-res', 'mhc/h-res-composite', 'mhc/gains'
# What became of the largest gain, forward and backward, while training.
HISTORY = {
    'single': ('mhc/amax-gain-forward', 'mhc/amax-gain-backward'),
    'composite': ('mhc/amax-composite-gain-forward', 'mhc/amax-composite-gain-backward'),
}
STYLES = {'forward': '-', 'backward': '--'}
SIMILARITY = 'mhc/stream-similarity'


class Run(NamedTuple):
    """What is drawn of one log folder.

    Args:
        name: in legends.
        scalars: tag -> iteration -> value.
        iteration: of the last report, which the maps and gains by sublayer are of; None where maps
            were not monitored, and then there are none.
        gains: ``[4][L]``, single forward and backward, composite forward and backward.
        h_res, composite: ``[L][n][n]``, means over the tokens.
    """

    name: str
    scalars: dict[str, dict[int, float]]
    iteration: int | None
    gains: list[Any]
    h_res: list[Any]
    composite: list[Any]


def read_run(folder: pathlib.Path, name: str) -> Run:
    """Read the events below ``folder``.

    Raises:
        ValueError: it holds no events, or those of several runs.
        RuntimeError: TensorBoard is not installed.
    """
    events = read_events(folder, f'LOGDIR {folder}')
    from tensorboard.util.tensor_util import make_ndarray

    values = scalars(events)
    # A run that was killed may have left some of them only, or some of its last report.
    tags = (GAINS, H_RES, COMPOSITE)
    if not {*tags} <= {*events.Tags()['tensors']}:
        return Run(name, values, None, [], [], [])
    found = [{event.step: event.tensor_proto for event in events.Tensors(tag)} for tag in tags]
    whole = found[0].keys() & found[1].keys() & found[2].keys()
    if not whole:
        return Run(name, values, None, [], [], [])
    arrays = [make_ndarray(protos[max(whole)]) for protos in found]
    layers = arrays[1].shape[:1]
    if [array.ndim for array in arrays] != [2, 3, 3] or any(
        array.shape != shape
        for array, shape in zip(
            arrays, ((4, *layers), arrays[1].shape, arrays[1].shape), strict=True
        )
    ):
        raise ValueError(
            f'LOGDIR {folder}: {H_RES} is not as --mhc-monitor writes it; name another'
        )
    return Run(name, values, max(whole), *(array.tolist() for array in arrays))


def chosen_sublayers(run: Run, wanted: list[int] | None) -> list[int]:
    """The sublayers of the heat-maps: those asked for, else the first, middle and last.

    Raises:
        ValueError: a number that the run does not have.
    """
    length = len(run.h_res)
    for sublayer in wanted or ():
        if not 0 <= sublayer < length:
            raise ValueError(
                f'--sublayers {sublayer}: {run.name} has sublayers 0 to {length - 1}, two a layer: '
                'attention, then MLP; take one of those'
            )
    return wanted or sorted({0, length // 2, length - 1})


def draw(runs: list[Run], output: pathlib.Path, sublayers: list[int] | None) -> None:
    """Write the page; its format follows from the name, as matplotlib has it (png, svg, pdf).

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: no run has maps, or no such sublayer, or no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'the page needs matplotlib, which is not installed; pip install matplotlib'
        ) from error
    mapped = [run for run in runs if run.iteration is not None]
    if not mapped:
        raise ValueError(
            f'LOGDIR: the events of {", ".join(run.name for run in runs)} have no {H_RES}; train '
            'with --mhc-monitor, and for at least --mhc-monitor-interval iterations'
        )
    chosen = [chosen_sublayers(run, sublayers) for run in mapped]
    columns = max(2 * len(numbers) for numbers in chosen)
    height = 3.0 * (4 + len(mapped))
    figure = Figure(figsize=(max(11, 2.4 * columns), height), dpi=110, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    if output.suffix.lstrip('.') not in canvas.get_supported_filetypes():
        raise ValueError(
            f'--output {output}: unknown format {output.suffix or "(none)"}; name a .png, .svg or '
            '.pdf file'
        )
    # An array of two, which its annotation leaves out.
    parts: Any = figure.subfigures(2, 1, height_ratios=[4, len(mapped)])
    curves, maps = parts
    _draw_curves(curves.subplots(4, 2), runs)
    panels = maps.subfigures(len(mapped), 1, squeeze=False)[:, 0]
    for panel, run, numbers in zip(panels, mapped, chosen, strict=True):
        _draw_maps(panel, run, numbers)
    figure.savefig(output)


def _draw_curves(axes: Any, runs: list[Run]) -> None:
    (loss, gap), (norm, similarity), histories, by_sublayer = axes
    for index, run in enumerate(runs):
        colour = f'C{index}'
        for panel, tag in ((loss, LOSS), (norm, GRADIENT_NORM), (similarity, SIMILARITY)):
            points = run.scalars.get(tag, {})
            panel.plot(list(points), list(points.values()), color=colour, lw=1, label=run.name)
        points = loss_gap(run, runs[0])
        gap.plot(list(points), list(points.values()), color=colour, lw=1, label=run.name)
        for panel, tags in zip(histories, HISTORY.values(), strict=True):
            for tag, (direction, style) in zip(tags, STYLES.items(), strict=True):
                points = run.scalars.get(tag, {})
                label = f'{run.name}, {direction}' if points else None
                panel.plot(list(points), list(points.values()), style, color=colour, label=label)
        for number, panel in enumerate(by_sublayer if run.gains else ()):
            for row, style in enumerate(STYLES.values()):
                gains = run.gains[2 * number + row]
                panel.plot(range(len(gains)), gains, style, color=colour, marker='.')
    loss.set(title='loss', xlabel='iteration')
    gap.set(title=f'loss, less that of {runs[0].name} (running mean)', xlabel='iteration')
    norm.set(title='gradient norm', xlabel='iteration')
    similarity.set(title='mean cosine of two streams', xlabel='iteration')
    for panel, kind in zip(histories, HISTORY, strict=True):
        panel.set(title=f'amax gain, {kind}, largest of all sublayers', xlabel='iteration')
    for panel, kind in zip(by_sublayer, ('H_res[l]', 'H_res[L-1] ... H_res[l]'), strict=True):
        panel.set(title=f'amax gain of {kind} at the last report', xlabel='sublayer l')
    for panel in (norm, *histories, *by_sublayer):
        panel.set_yscale('log')
    for panel in (*axes[0], norm, *histories):
        panel.legend(fontsize=7)
    for panel in axes.flat:
        panel.grid(alpha=0.3)


def loss_gap(run: Run, baseline: Run) -> dict[int, float]:
    """Iteration -> loss of ``run`` less that of ``baseline``, a mean over a tenth of the points."""
    losses, base = run.scalars.get(LOSS, {}), baseline.scalars.get(LOSS, {})
    gaps = {step: losses[step] - base[step] for step in losses if step in base}
    window, values = max(1, len(gaps) // 10), list(gaps.values())
    return {
        step: sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
        for i, step in enumerate(gaps)
    }


def _draw_maps(figure: Any, run: Run, sublayers: list[int]) -> None:
    last = len(run.h_res) - 1
    drawn = [(f'H_res[{number}]', run.h_res[number]) for number in sublayers]
    # From the last one on, the composite is the single map.
    drawn += [
        (f'H_res[{last}] ... H_res[{number}]', run.composite[number])
        for number in sublayers
        if number < last
    ]
    figure.suptitle(f'{run.name}, iteration {run.iteration}: mean maps, row and column sums')
    for panel, (title, matrix) in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        panel.imshow(matrix, cmap='RdBu_r', vmin=-1, vmax=1)
        panel.set_title(title, fontsize=8)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                colour = 'white' if abs(value) > 0.6 else 'black'
                panel.text(j, i, f'{value:.3g}', ha='center', va='center', fontsize=6, color=colour)
        panel.set_yticks(range(len(matrix)), [f'{sum(row):.3g}' for row in matrix], fontsize=6)
        sums = [f'{sum(column):.3g}' for column in zip(*matrix, strict=True)]
        panel.set_xticks(range(len(matrix)), sums, fontsize=6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc report``."""
    parser.set_defaults(answer=__name__)
    parser.add_argument(
        'folders',
        nargs='+',
        metavar='[NAME=]LOGDIR',
        help='folder of --tensorboard-dir; several runs are drawn over each other',
    )
    parser.add_argument(
        '-o',
        '--output',
        type=pathlib.Path,
        default=pathlib.Path('mhc-report.png'),
        metavar='FILE',
        help='page to write: .png, .svg or .pdf (default: mhc-report.png)',
    )
    parser.add_argument(
        '--sublayers',
        nargs='+',
        type=int,
        metavar='L',
        help='sublayers of the heat-maps, from 0, two a layer (default: first, middle and last)',
    )


def main(options: argparse.Namespace) -> int:
    """Draw the page; wrong input is one line."""
    try:
        named = [folder.partition('=') for folder in options.folders]
        # A dollar sign would begin a formula.
        pairs = [(path or name, name.replace('$', r'\$')) for name, _, path in named]
        draw(
            [read_run(pathlib.Path(path), name) for path, name in pairs],
            options.output,
            options.sublayers,
        )
    except OSError as error:
        why = f'--output {options.output}: {error.strerror}; name a file that can be written'
        refuse('megatron-mhc report', why)
    except (RuntimeError, ValueError) as error:
        refuse('megatron-mhc report', str(error))
    print(options.output)
    return 0
