"""Plot training and validation loss of one or more runs from their TensorBoard events.

python tools/plot_losses.py --output losses.png mhc=runs/quickstart/mhc/tensorboard
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.monitor.events import read_events, scalars
from megatron_mhc.monitor.names import LOSS as TRAIN

FORMATS = ('.png', '.svg', '.pdf')
VALID = f'{TRAIN} validation'
# name -> for each seed {tag: {iteration: loss}}.
Runs = dict[str, list[dict[str, dict[int, float]]]]


def read_losses(folder: Path) -> dict[str, dict[int, float]]:
    """``{tag: {iteration: loss}}`` for training and validation.

    Raises:
        ValueError: there are no losses in ``folder``.
        RuntimeError: TensorBoard is not installed.
    """
    found = scalars(read_events(folder, str(folder)))
    return {tag: found.get(tag, {}) for tag in (TRAIN, VALID)}


def mean_curve(curves: list[dict[int, float]]) -> dict[int, float]:
    """At the iterations that all ``curves`` have."""
    shared = sorted(set.intersection(*map(set, curves)))
    return {at: statistics.mean(curve[at] for curve in curves) for at in shared}


def plot(runs: Runs, output: Path, title: str, source: str = '') -> None:
    """Draw means over seeds: training thin, validation thick with dots, one colour a name.

    Of several names, a second panel has validation less that of the first name: a line for each
    seed, and their mean. ``source`` is kept in the picture, as what its figures are of.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    panels = 2 if len(runs) > 1 else 1
    figure, every = pyplot.subplots(
        1, panels, figsize=(8 if panels == 1 else 12, 5), layout='constrained', squeeze=False
    )
    axes = every[0, 0]
    for index, (name, seeds) in enumerate(runs.items()):
        # A dollar sign would begin a formula.
        name = name.replace('$', r'\$')
        colour = f'C{index}'
        training = mean_curve([losses[TRAIN] for losses in seeds])
        axes.plot(*zip(*training.items(), strict=True), color=colour, alpha=0.35, lw=1)
        axes.plot([], [], color=colour, alpha=0.35, label=f'{name}, training')
        validation = mean_curve([losses[VALID] for losses in seeds])
        if validation:
            points = zip(*validation.items(), strict=True)
            axes.plot(*points, color=colour, marker='o', ms=4, label=f'{name}, validation')
    axes.set(title=title.replace('$', r'\$'), xlabel='iteration', ylabel='loss per byte (nats)')
    if panels == 2:
        _differences(every[0, 1], runs)
    for axes in every[0]:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=120, metadata={'Title': source} if source else None)
    pyplot.close(figure)


def _differences(axes: Any, runs: Runs) -> None:
    (base, *names) = runs
    for index, name in enumerate(names, 1):
        curves = []
        for seed, other in zip(runs[name], runs[base], strict=True):
            shared = sorted(seed[VALID].keys() & other[VALID].keys())
            curves.append({at: seed[VALID][at] - other[VALID][at] for at in shared})
            axes.plot(*zip(*curves[-1].items(), strict=True), color=f'C{index}', alpha=0.35, lw=1)
        mean = zip(*mean_curve(curves).items(), strict=True)
        label = f'{name}, mean of {len(curves)} seeds' if len(curves) > 1 else f'{name}, one seed'
        axes.plot(*mean, color=f'C{index}', marker='o', ms=4, label=label.replace('$', r'\$'))
    axes.axhline(0, color='C0', lw=1)
    base = base.replace('$', r'\$')
    axes.set(title=f'Validation less that of {base}', xlabel='iteration', ylabel='nats per byte')


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog='plot_losses.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('runs', nargs='+', metavar='NAME=TENSORBOARD_DIR')
    parser.add_argument('--output', type=Path, required=True, help='PNG to write')
    parser.add_argument('--title', default='Loss')
    options = parser.parse_args(argv)
    if options.output.suffix not in FORMATS:
        parser.error(f'--output {options.output}: unknown format; name a .png, .svg or .pdf file')
    if not options.output.absolute().parent.is_dir():
        parser.error(f'--output {options.output}: no such folder; name one that is there')
    named = {}
    for run in options.runs:
        name, found, folder = run.partition('=')
        if not name or not found or name in named:
            parser.error(
                f'argument runs: {run}: wanted NAME=TENSORBOARD_DIR, each name once; add it'
            )
        named[name] = Path(folder)
    try:
        runs = {name: [read_losses(path)] for name, path in named.items()}
        plot(runs, options.output, options.title)
    except (RuntimeError, ValueError, OSError) as error:
        refuse(parser.prog, str(error))


if __name__ == '__main__':
    main()
