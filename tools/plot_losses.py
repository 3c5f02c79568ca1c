"""Plot training and validation loss of one or more runs from their TensorBoard events.

python tools/plot_losses.py --output losses.png mhc=runs/quickstart/mhc/tensorboard
"""

import argparse
from pathlib import Path

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.monitor.events import LOSS as TRAIN
from megatron_mhc.monitor.events import read_events, scalars

FORMATS = ('.png', '.svg', '.pdf')
VALID = f'{TRAIN} validation'


def read_losses(folder: Path) -> dict[str, dict[int, float]]:
    """``{tag: {iteration: loss}}`` for training and validation.

    Raises:
        ValueError: there are no losses in ``folder``.
        RuntimeError: TensorBoard is not installed.
    """
    found = scalars(read_events(folder, str(folder)))
    return {tag: found.get(tag, {}) for tag in (TRAIN, VALID)}


def plot(runs: dict[str, dict[str, dict[int, float]]], output: Path, title: str) -> None:
    """Draw ``{name: losses}``: training thin, validation thick with dots, one colour a run."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout='constrained')
    for index, (name, losses) in enumerate(runs.items()):
        # A dollar sign would begin a formula.
        name = name.replace('$', r'\$')
        colour = f'C{index}'
        axes.plot(*zip(*losses[TRAIN].items(), strict=True), color=colour, alpha=0.35, lw=1)
        axes.plot([], [], color=colour, alpha=0.35, label=f'{name}, training')
        if losses[VALID]:
            points = zip(*losses[VALID].items(), strict=True)
            axes.plot(*points, color=colour, marker='o', ms=4, label=f'{name}, validation')
    axes.set(title=title.replace('$', r'\$'), xlabel='iteration', ylabel='loss per byte (nats)')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


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
        plot({n: read_losses(p) for n, p in named.items()}, options.output, options.title)
    except (RuntimeError, ValueError, OSError) as error:
        refuse(parser.prog, str(error))


if __name__ == '__main__':
    main()
