"""Compare where hyper-connections start: loss over seeds, paired with the standard model's.

Runs are those of the quick start (tools/quickstart_flags.py) on the CPU, one process each. A run
that is in the results file is not repeated, so a study that was stopped goes on, and more seeds or
iterations add to it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import integer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

from loss_table import mean_and_error  # noqa: E402
from plot_losses import FORMATS  # noqa: E402

MHC = ['--residual-type', 'mhc']
IDENTITY = [*MHC, '--mhc-init', 'identity']


class Setting(NamedTuple):
    """Flags, and what ``--mhc-init identity`` stands for where no preset says it (``Start``)."""

    flags: list[str]
    start: dict[str, Any] | None = None


SETTINGS = {
    'standard': Setting(['--residual-type', 'standard']),
    'hc': Setting(['--residual-type', 'hc']),
    'uniform': Setting([*MHC, '--mhc-init', 'uniform']),
    'identity': Setting(IDENTITY),
    'equal-writes': Setting([*MHC, '--mhc-init', 'equal-writes']),
    'prenorm': Setting([*MHC, '--mhc-init', 'prenorm']),
    'one stream': Setting([*MHC, '--mhc-num-residual-streams', '1']),
    'pre': Setting(IDENTITY, {'pre': 3.0}),
    'post': Setting(IDENTITY, {'post': 1.0}),
    'res': Setting(IDENTITY, {'res': 'identity'}),
    'pre, post': Setting(IDENTITY, {'pre': 3.0, 'post': 1.0}),
    'post, res': Setting(IDENTITY, {'post': 1.0, 'res': 'identity'}),
    'alpha 0': Setting([*IDENTITY, '--mhc-init-gating-factor', '0']),
    'alpha 0.1': Setting([*IDENTITY, '--mhc-init-gating-factor', '0.1']),
    'alpha 1': Setting([*IDENTITY, '--mhc-init-gating-factor', '1']),
    'lr x 3': Setting([*IDENTITY, '--mhc-mapping-lr-mult', '3']),
    'lr x 10': Setting([*IDENTITY, '--mhc-mapping-lr-mult', '10']),
    'merge sum': Setting([*IDENTITY, '--mhc-stream-merge', 'sum']),
    'merge learned': Setting([*IDENTITY, '--mhc-stream-merge', 'learned']),
    'hc, merge mean': Setting(['--residual-type', 'hc', '--mhc-stream-merge', 'mean']),
    'eps 1e-20': Setting([*IDENTITY, '--mhc-norm-eps', '1e-20']),
}
MAIN = ['standard', 'hc', 'uniform', 'identity']
# Group -> size of the model, settings.
GROUPS = {
    'main': ('quickstart', MAIN),
    'init': ('quickstart', [*MAIN, 'equal-writes', 'prenorm', 'one stream']),
    'factors': ('quickstart', ['pre', 'post', 'res', 'pre, post', 'post, res']),
    'alpha': ('quickstart', ['alpha 0', 'alpha 0.1', 'alpha 1']),
    'mapping-lr': ('quickstart', ['lr x 3', 'lr x 10']),
    'merge': ('quickstart', ['merge sum', 'merge learned', 'hc, merge mean']),
    'eps': ('quickstart', ['eps 1e-20']),
    'deep': ('deep', MAIN),
    'bpe': ('bpe', MAIN),
}


class Run(NamedTuple):
    size: str
    setting: str
    iters: int
    seed: int

    def __str__(self) -> str:
        return f'{self.size}, {self.setting}, {self.iters} iterations, seed {self.seed}'


Results = dict[Run, dict[str, float]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='init_study.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='groups:\n'
        + '\n'.join(f'  {name:11} {size}: {"; ".join(s)}' for name, (size, s) in GROUPS.items()),
    )
    parser.add_argument('--seeds', type=integer(1, 1000), default=2, help='1 to SEEDS (default: 2)')
    parser.add_argument('--iters', type=integer(2), default=100, help='default: 100')
    parser.add_argument('--jobs', type=integer(1, 1024), default=1, help='runs at a time')
    parser.add_argument(
        '--only', nargs='+', choices=list(GROUPS), metavar='GROUP', help='see below'
    )
    parser.add_argument('--table', action='store_true', help='train nothing, print the table')
    parser.add_argument('--against', choices=list(SETTINGS), default='standard', metavar='SETTING')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='train nothing, draw the results')
    parser.add_argument(
        '--results', type=Path, default=ROOT / 'examples' / 'init_study.jsonl', metavar='JSONL'
    )
    parser.add_argument(
        '--output', type=Path, default=ROOT / 'runs' / 'init_study', help='text and logs'
    )
    options = parser.parse_args(argv)
    if options.plot and options.plot.suffix not in FORMATS:
        parser.error(f'--plot {options.plot}: unknown format; name a .png, .svg or .pdf file')
    for flag, path in (('--plot', options.plot), ('--results', options.results)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f'{flag} {path}: no such folder; name one that is there')
    return options


def wanted(options: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that whenever it is stopped all settings have about as many."""
    every = (
        Run(size, setting, options.iters, seed)
        for seed in range(1, options.seeds + 1)
        for size, settings in (GROUPS[name] for name in options.only or GROUPS)
        for setting in settings
    )
    # Groups have settings in common.
    return list(dict.fromkeys(every))


def read(path: Path) -> tuple[Results, set[str]]:
    """Results by run, and the digests of the texts that they were trained on.

    Raises:
        ValueError: it is no text, or a line is no result.
    """
    results, texts = {}, set()
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except UnicodeDecodeError as error:
        raise ValueError(f'--results {path}: not text; name a file of JSON lines') from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            run = Run(*(record.pop(name) for name in Run._fields))
            texts.add(record.pop('text'))
            results[run] = record
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f'--results {path}: line {number} is no result; remove it') from error
    return results, texts


def study(options: argparse.Namespace) -> bool:
    """Train what is wanted and not there yet; returns whether all of it succeeded."""
    import init_study_run as one

    results, texts = read(options.results)
    missing = [run for run in wanted(options) if run not in results]
    print(f'{len(missing)} of {len(wanted(options))} runs to do, results in {options.results}')
    if not missing:
        return True
    logs = options.output / 'logs'
    logs.mkdir(parents=True, exist_ok=True)
    one.load_megatron()
    digest = one.prepare(options.output, {run.size for run in missing})[:12]
    if texts - {digest}:
        raise ValueError(
            f'--results {options.results}: trained on the standard library of another Python, '
            'whose losses cannot be compared; name a new file'
        )

    def begin(run: Run) -> tuple[int, Path]:
        setting = SETTINGS[run.setting]
        arguments = one.command(options.output, run.size, setting.flags, run.iters, run.seed)
        log = logs / f'{"-".join(map(str, run)).replace(" ", "")}.log'
        return one.run_in_child(arguments, setting.start, log), log

    began, done, failed = time.monotonic(), 0, 0
    active: dict[int, tuple[Run, Path]] = {}
    todo = iter(missing)
    while True:
        while len(active) < options.jobs and (run := next(todo, None)) is not None:
            child, log = begin(run)
            active[child] = run, log
        if not active:
            return not failed
        child, status = os.wait()
        run, log = active.pop(child)
        done += 1
        left = (time.monotonic() - began) / done * (len(missing) - done) / 60
        if status:
            failed += 1
            print(f'{run}: failed, see {log}', flush=True)
            continue
        outcome = json.loads(log.with_suffix('.json').read_text())
        record = {**run._asdict(), 'text': digest, **outcome}
        with options.results.open('a') as file:
            file.write(json.dumps(record) + '\n')
        print(
            f'{done}/{len(missing)} {run}: {outcome["valid"]:.4f}, about {left:.0f} minutes left',
            flush=True,
        )


class Row(NamedTuple):
    """One setting: its loss and its loss less the reference's, each as (mean, standard error)."""

    setting: str
    seeds: int
    loss: tuple[float, float]
    pairs: dict[int, float]
    difference: tuple[float, float]


def rows(results: Results, size: str, iters: int, against: str) -> list[Row]:
    """In the order of ``SETTINGS``; a difference is taken between runs of the same seed."""
    found = []
    for setting in SETTINGS:
        valid, reference = (
            {r.seed: v['valid'] for r, v in results.items() if r[:3] == (size, name, iters)}
            for name in (setting, against)
        )
        if not valid:
            continue
        pairs = {s: valid[s] - reference[s] for s in sorted(valid.keys() & reference.keys())}
        found.append(
            Row(
                setting,
                len(valid),
                mean_and_error(list(valid.values())),
                pairs,
                mean_and_error(list(pairs.values())),
            )
        )
    return found


def studies(results: Results) -> list[tuple[str, int]]:
    """Size and iterations of all that was trained."""
    order = list(dict.fromkeys(size for size, _ in GROUPS.values()))
    return sorted({(r.size, r.iters) for r in results}, key=lambda s: (order.index(s[0]), s[1]))


def table(results: Results, against: str) -> str:
    """Markdown, one table for each size and number of iterations."""

    def shown(value: tuple[float, float], sign: str = '') -> str:
        mean, error = value
        if math.isnan(mean):
            return '-'
        return f'{mean:{sign}.4f}' + ('' if math.isnan(error) else f' +- {error:.4f}')

    text = []
    for size, iters in studies(results):
        text += [
            f'{size}, {iters} iterations\n',
            f'| setting | seeds | validation loss | less that of {against} |',
            '| --- | --- | --- | --- |',
        ]
        for row in rows(results, size, iters, against):
            difference = '0' if row.setting == against else shown(row.difference, '+')
            cells = row.setting, str(row.seeds), shown(row.loss), difference
            text.append(f'| {" | ".join(cells)} |')
        text.append('')
    return '\n'.join(text)


def plot(results: Results, against: str, image: Path) -> None:
    """Loss less the reference's: dots are seeds, bars the standard error of their mean."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    panels = [(s, i, rows(results, s, i, against)) for s, i in studies(results)]
    panels = [
        (s, i, [r for r in found if r.pairs and r.setting != against]) for s, i, found in panels
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise ValueError(f'--plot {image}: no seed has {against} and another setting; train more')
    figure, grid = pyplot.subplots(
        len(panels),
        squeeze=False,
        figsize=(7, sum(1.2 + 0.26 * len(found) for _, _, found in panels)),
        height_ratios=[1 + 0.26 * len(found) for _, _, found in panels],
        layout='constrained',
    )
    for axes, (size, iters, found) in zip(grid[:, 0], panels, strict=True):
        for y, row in enumerate(found):
            axes.plot(
                list(row.pairs.values()), [y] * len(row.pairs), 'o', color='C0', ms=3, alpha=0.4
            )
            axes.errorbar(row.difference[0], y, xerr=row.difference[1], fmt='|', color='C0', lw=2)
        axes.axvline(0, color='black', lw=0.8)
        axes.set_yticks(range(len(found)), [row.setting for row in found])
        axes.invert_yaxis()
        axes.locator_params(axis='x', nbins=8)
        axes.grid(axis='x', alpha=0.3)
        axes.set_title(f'{size}, {iters} iterations', fontsize='medium')
    grid[-1, 0].set_xlabel(f'validation loss less that of {against}, same seed (nats per token)')
    figure.savefig(image, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        complete = True
        if not (options.table or options.plot):
            complete = study(options)
        results, _ = read(options.results)
        if not results:
            raise ValueError(f'--results {options.results}: holds no results; train some first')
        if not options.plot or options.table:
            print(table(results, options.against))
        if options.plot:
            plot(results, options.against, options.plot)
    except KeyboardInterrupt:
        sys.exit('Stopped. The same command goes on with the runs that are missing.')
    except ValueError as error:
        refuse('init_study.py', str(error))
    except (OSError, RuntimeError) as error:
        sys.exit(f'init_study: error: {error}')
    sys.exit(0 if complete else 1)


if __name__ == '__main__':
    main()
