"""Plot training and validation loss of one or more runs from their TensorBoard events.

python tools/plot_losses.py --output losses.png mhc=runs/quickstart/mhc/tensorboard
"""

import argparse
from pathlib import Path

from megatron_mhc.inputs.refusal import OneLineParser, refuse

FORMATS = ('.png', '.svg', '.pdf')
TRAIN, VALID = 'lm loss', 'lm loss validation'


def read_losses(folder: Path) -> dict[str, dict[int, float]]:
    """``{tag: {iteration: loss}}`` for training and validation.

    Megatron validates once more after the last iteration, and a resumed run may repeat iterations
    that it had logged before; the first value of an iteration counts.

    Raises:
        ValueError: there are no losses in ``folder``.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        raise ValueError(f'{folder}: no such folder; name a run folder')
    try:
        # 0: keep every point instead of a random sample.
        events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    # What a damaged file raises depends on where it is damaged.
    except Exception as error:
        raise ValueError(f'{folder}: events cannot be read: {error}; name a whole run') from error
    tags = set(events.Tags()['scalars'])
    losses = {tag: {} for tag in (TRAIN, VALID)}
    for tag in tags.intersection(losses):
        for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time):
            losses[tag].setdefault(event.step, event.value)
        losses[tag] = dict(sorted(losses[tag].items()))
    if not losses[TRAIN]:
        raise ValueError(f'{folder}: holds no TensorBoard scalar {TRAIN!r}; name a run folder')
    return losses


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
    except (ValueError, OSError) as error:
        refuse(parser.prog, str(error))


if __name__ == '__main__':
    main()
