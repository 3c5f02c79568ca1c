"""Rows of measurements as CSV, as Markdown, and as a bar chart of what a sublayer costs.

python tools/bench/bench_report.py RESULTS.csv    # tables and chart again, from the CSV alone
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_type_hints

from bench_bytes import BOTH
from bench_measure import COLUMNS, OK, Row
from bench_ours import OURS

CSV, MARKDOWN, CHART, FACTS = 'results.csv', 'results.md', 'sublayer.png', 'environment.json'
PREFERRED = tuple(kind.name for kind in OURS)
"""Whose time the others are divided by: the first of these that was measured at that point."""


def write_all(folder: Path, rows: list[Row], facts: dict[str, str], notes: list[str]) -> None:
    """CSV, environment, Markdown and chart; safe to call again as rows come in."""
    folder.mkdir(parents=True, exist_ok=True)
    compare(rows)
    with (folder / CSV).open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)
    (folder / FACTS).write_text(json.dumps({'facts': facts, 'notes': notes}, indent=1) + '\n')
    (folder / MARKDOWN).write_text(markdown(rows, facts, notes))
    chart(folder / CHART, rows, facts)


def read_all(path: Path) -> tuple[list[Row], dict[str, str], list[str]]:
    """What ``write_all`` wrote, from the CSV and the environment beside it."""
    hints = get_type_hints(Row)

    def value(name: str, text: str) -> object:
        if hints[name] is str:
            return text
        kind = int if hints[name] in (int, int | None) else float
        return kind(text) if text else None

    with path.open(newline='') as file:
        rows = [Row(**{k: value(k, v) for k, v in line.items()}) for line in csv.DictReader(file)]
    header = json.loads((path.parent / FACTS).read_text())
    return rows, header['facts'], header['notes']


def compare(rows: Iterable[Row]) -> None:
    """Fill ``times_ours``: how many times our time each row takes, at the same point."""
    rows = [row for row in rows if row.status == OK]
    ours: dict[tuple, Row] = {}
    for row in rows:
        if row.contender not in PREFERRED:
            continue
        best = ours.setdefault(row.point, row)
        if PREFERRED.index(row.contender) < PREFERRED.index(best.contender):
            ours[row.point] = row
    for row in rows:
        if row.point in ours:
            row.times_ours = row.median_us / ours[row.point].median_us


def markdown(rows: list[Row], facts: dict[str, str], notes: list[str]) -> str:
    """Environment, one table per op with a line per measurement, and what was not measured."""
    lines = ['# mHC ops: measured times', '', '| | |', '|---|---|']
    lines += [f'| {_cell(label)} | {_cell(value)} |' for label, value in facts.items()]
    lines += ['', *(f'- {note}' for note in notes), '']
    lines += [
        'Times are microseconds per call (`layer`: per sublayer), median, lowest and 90th',
        'percentile. GB/s are of ideal bytes, the same for all implementations of an op; copy % is',
        'their share of the copy bandwidth of this run. Errors are the worst relative RMS against',
        'fp64. The columns are explained in tools/bench/README.md.',
    ]
    measured = [row for row in rows if row.status == OK]
    for op, direction in dict.fromkeys((row.op, row.direction) for row in measured):
        lines += ['', f'## {op}, {direction}', '', *_table(measured, op, direction)]
    rest = [row for row in rows if row.status != OK]
    if rest:
        lines += ['', '## Not measured', '', '| op | implementation | shape | why |']
        lines.append('|---|---|---|---|')
        for row in rest:
            op = ' '.join(filter(None, (row.op, row.direction, row.mode)))
            error = f'; errors {_errors(row)}' if _errors(row) else ''
            lines.append(f'| {op} | {row.contender} | {_shape(row)} | {_cell(row.status)}{error} |')
    return '\n'.join(lines) + '\n'


def _table(rows: list[Row], op: str, direction: str) -> list[str]:
    head = 'shape | mode | implementation | median | low | p90 | GB/s | copy % | times ours'
    head += ' | error fwd, bwd | bwd repeatable | target'
    lines = [f'| {head} |', '|' + '---|' * (head.count('|') + 1)]
    chosen = [row for row in rows if (row.op, row.direction) == (op, direction)]
    points = list(dict.fromkeys(row.point for row in chosen))
    for row in sorted(chosen, key=lambda row: (points.index(row.point), row.median_us)):
        cells = [
            *(_shape(row), row.mode, row.contender),
            *(f'{us:.1f}' for us in (row.median_us, row.min_us, row.p90_us)),
            *(f'{row.ideal_gb_per_s:.0f}', f'{100 * row.copy_share:.0f}'),
            '' if row.times_ours is None else f'{row.times_ours:.2f}',
            _errors(row),
            row.bwd_repeatable,
            f'{row.target}: {row.target_met}' if row.target else '',
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def _shape(row: Row) -> str:
    return f'C={row.hidden} T={row.tokens} n={row.streams} {row.dtype}'


def _errors(row: Row) -> str:
    if row.error_fwd is None:
        return ''
    return f'{row.error_fwd:.1e}, {row.error_bwd:.1e} ({row.worst_grad})'


def _cell(text: str) -> str:
    return text.replace('|', '\\|')


def chart(path: Path, rows: list[Row], facts: dict[str, str]) -> None:
    """Bars of ``times_ours`` for forward and backward of a layer's sublayer, shape by shape."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = [row for row in rows if row.op == 'layer' and row.direction == BOTH and row.times_ours]
    # One mode: what a captured step costs, or where nothing was captured, what there is.
    modes = {row.mode for row in rows}
    mode = 'graph' if 'graph' in modes else next(iter(sorted(modes)), '')
    rows = [row for row in rows if row.mode == mode]
    shapes = list(dict.fromkeys(map(_shape, rows)))
    names = list(dict.fromkeys(row.contender for row in rows))
    height = {(row.contender, _shape(row)): row for row in rows}
    figure, axes = pyplot.subplots(
        figsize=(max(7, 1.2 + 0.28 * len(shapes) * (len(names) + 1)), 5), layout='constrained'
    )
    width = 0.85 / max(1, len(names))
    for index, name in enumerate(names):
        present = [i for i, shape in enumerate(shapes) if (name, shape) in height]
        found = [height[name, shapes[i]] for i in present]
        left = [i + (index - (len(names) - 1) / 2) * width for i in present]
        bars = axes.bar(left, [row.times_ours for row in found], width, label=name)
        axes.bar_label(bars, [f'{row.times_ours:.2f}' for row in found], fontsize=6, rotation=90)
    if not rows:
        axes.text(0.5, 0.5, 'no sublayer was measured', ha='center', transform=axes.transAxes)
    else:
        axes.axhline(1, color='black', lw=0.8)
        axes.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    axes.set_xticks(range(len(shapes)), shapes, rotation=20, ha='right', fontsize=7)
    axes.set(
        title=f'Forward + backward per sublayer, time relative to ours ({mode})\n'
        f'{facts.get("device", "")}',
        ylabel='times ours (lower is faster)',
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', type=Path, help='results.csv of a run')
    options = parser.parse_args()
    try:
        rows, facts, notes = read_all(options.results)
    except (OSError, KeyError, TypeError, ValueError) as error:
        sys.exit(f'{parser.prog}: error: {options.results}: {error}')
    write_all(options.results.parent, rows, facts, notes)


if __name__ == '__main__':
    main()
