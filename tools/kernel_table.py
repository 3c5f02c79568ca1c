"""Write the table *predicted, measured, peers* of the kernel pages, from a record of the model.

    python tools/kernel_table.py            predict ours and every installed peer, record, write
    python tools/kernel_table.py --pages    write the pages again from the record
    python tools/kernel_table.py --report F  from what the report printed with --json, in a file

The record is ``kernels/compared.json``; a peer that is not installed keeps the row that it has
there, with its date. Measured times come from ``results.csv`` in ``tools/bench/results``. Peers are
looked for on PYTHONPATH too: ``python tests/te/te_wheel.py`` prints a folder with
TransformerEngine's, ``pip install --no-deps --target FOLDER liger-kernel`` makes one with Liger's.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD, RESULTS = ROOT / 'kernels' / 'compared.json', ROOT / 'tools' / 'bench' / 'results'
# Page -> what stands there between its two marks.
PAGES = {ROOT / 'kernels' / 'README.md': 'table', ROOT / 'README.md': 'line'}
MARKS = ('<!-- tools/kernel_table.py -->', '<!-- /tools/kernel_table.py -->')
NAMES = {
    'ours': 'ours',
    'te': 'TransformerEngine',
    'te-split-k': 'TransformerEngine, split-K',
    'te-buffer': 'TransformerEngine, fp32 buffer',
    'liger': 'Liger',
    'liger-half-phi': 'Liger, phi in bf16',
    'megatron': "Megatron dev's Triton",
}
KEPT = ('launches', 'torch_kernels', 'predicted_us', 'copy_percent', 'spilling', 'configurations')


def predicted() -> dict[str, Any]:
    """What the report says now, for four streams on the GPU and the shape of its defaults."""
    command = [sys.executable, '-m', 'megatron_mhc', 'kernels', 'report', '--json', '--roofline']
    command += ['--num-streams', '4', '--peers', 'all']
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit('kernel_table.py: error: the report fails; run it without --json, and mend that')
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def updated(record: dict[str, Any], found: dict[str, Any], today: str) -> dict[str, Any]:
    """The record with the rows that ``found`` has a prediction of."""
    rows = dict(record.get('rows', {}))
    for row in found['roofline']['peers']:
        if 'reason' not in row:
            kept = {key: row[key] for key in KEPT} | {'version': row.get('version', '')}
            kept['predicted_us'] = round(kept['predicted_us'])
            kept['copy_percent'] = round(kept['copy_percent'])
            rows[row['peer']] = kept | {'date': today, 'triton': found['triton']}
        elif row['peer'] not in rows:
            print(f'{row["peer"]}: no row, {row["reason"]}', file=sys.stderr)
    shape = {key: found[key] for key in ('hidden_size', 'tokens', 'dtype')}
    ordered = {name: rows[name] for name in NAMES if name in rows}
    return {'gpu': found['roofline']['gpu'], 'num_streams': 4} | shape | {'rows': ordered}


def measured(record: dict[str, Any], results: Path = RESULTS) -> dict[str, tuple[float, str]]:
    """Contender -> microseconds of a sublayer as the bench measured them on this GPU, and when.

    Of several runs the newest counts; ours is ``triton`` there.
    """
    found: dict[str, tuple[str, float, str]] = {}
    for path in sorted(results.glob('**/results.csv')):
        facts = json.loads((path.parent / 'environment.json').read_text())
        if record['gpu'] not in facts['device'].lower():
            continue
        with path.open(newline='') as file:
            for row in csv.DictReader(file):
                shape = (row['hidden'], row['tokens'], row['streams'], row['dtype'])
                wanted = (record['hidden_size'], record['tokens'], record['num_streams'])
                if (row['op'], row['direction'], row['mode']) != ('layer', 'fwd+bwd', 'graph'):
                    continue
                if row['status'] == 'ok' and shape == (*map(str, wanted), record['dtype']):
                    name = {'triton': 'ours'}.get(row['contender'], row['contender'])
                    seen = (facts['date'], float(row['median_us']), path.parent.name)
                    found[name] = max(found.get(name, seen), seen)
    return {name: (us, date) for name, (date, us, _) in found.items()}


def table(record: dict[str, Any], seen: dict[str, tuple[float, str]]) -> str:
    """The table, as the page of the kernels has it."""
    shape = f'C = {record["hidden_size"]}, T = {record["tokens"]}, n = {record["num_streams"]}'
    where = f'{record["dtype"]} on {record["gpu"].upper()}'
    lines = [
        '',
        f'One sublayer, forward and backward: {shape}, {where}. **Predicted is the model above, '
        'not measured.**',
        _state(seen),
        '',
        '| whose | launches, torch kernels | predicted, us | % of copy | times ours | measured, us '
        '| spilling | predicted on |',
        '|---|---|---|---|---|---|---|---|',
    ]
    ours = record['rows']['ours']['predicted_us']
    for name, row in record['rows'].items():
        time = f'{seen[name][0]:.0f} ({seen[name][1][:10]})' if name in seen else '-'
        version = f' ({row["version"]})' if row['version'] else ''
        cells = (
            f'{NAMES[name]}{version}',
            f'{row["launches"]}, {row["torch_kernels"]}',
            *(str(row['predicted_us']), str(row['copy_percent'])),
            f'{row["predicted_us"] / ours:.2f}',
            *(time, ', '.join(row['spilling']) or 'none'),
            f'{row["date"]}, Triton {row["triton"]}',
        )
        lines.append(f'| {" | ".join(cells)} |')
    lines += [
        '',
        'Each peer is started by its own Python and compiled here; of a tuned kernel every',
        'configuration is predicted and the fastest counts. Torch kernels take their bytes at the',
        'speed of a copy and 2 us, and what a peer reads again from L2 is left out: both favour',
        'the peers. `python tools/kernel_table.py` writes this table.',
    ]
    return '\n'.join(lines) + '\n'


def line(record: dict[str, Any], seen: dict[str, tuple[float, str]]) -> str:
    """What the front page says of it."""
    rows = record['rows']
    ours = rows['ours']
    others = [
        f'{NAMES[name]} {rows[name]["predicted_us"]}'
        for name in ('te', 'liger', 'megatron')
        if name in rows
    ]
    return (
        f'Kernels: one sublayer takes {ours["predicted_us"]} us on {record["gpu"].upper()} by a '
        f'static model ({ours["date"]}; {", ".join(others)}). {_state(seen)} '
        '[The table](kernels/README.md#predicted-speed).'
    )


def _state(seen: dict[str, tuple[float, str]]) -> str:
    if seen:
        return f'Measured: {", ".join(f"{n} {us:.0f} us" for n, (us, _) in seen.items())}.'
    return 'Measured: nothing yet.'


def page(text: str, part: str) -> str:
    """``text`` with ``part`` between its marks.

    Raises:
        ValueError: the marks are not there, each once.
    """
    start, end = MARKS
    pattern = re.compile(f'{re.escape(start)}.*?{re.escape(end)}', re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f'{start} and {end} have to stand there once, in this order')
    return pattern.sub(lambda _: start + part + end, text)


def pages(record: dict[str, Any], results: Path = RESULTS) -> dict[Path, str]:
    """What each page has to be."""
    seen = measured(record, results)
    parts = {'table': table(record, seen), 'line': line(record, seen)}
    return {path: page(path.read_text(), parts[kind]) for path, kind in PAGES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pages', action='store_true', help='from the record, predict nothing')
    parser.add_argument('--report', type=Path, help='output of kernels report --json with --peers')
    options = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not options.pages:
        today = f'{datetime.date.today():%Y-%m-%d}'
        found = json.loads(options.report.read_text()) if options.report else predicted()
        record = updated(record, found, today)
        RECORD.write_text(json.dumps(record, indent=2) + '\n')
    for path, text in pages(record).items():
        path.write_text(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
