#!/usr/bin/env python3
"""Make kernels/record.json anew with every supported Triton, after kernels have changed on purpose.

    python tools/kernel_record.py
    python tools/kernel_record.py --predictions    # what the model says, alone and sooner
    python tools/kernel_record.py --kernel post_res_backward    # what begins like this, alone

Versions are laid beside the environment, one folder ``triton-<version>`` each, and fetched with pip
where they are missing. Nothing is written if a kernel spills or is out of bounds otherwise. The
exceptions, which a person wrote with their reasons, stay as they are.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / 'kernels' / 'record.json'
# Of the predictions, those of the paper's number of streams are kept.
RECORDED_STREAMS = 4
VERSIONS = runpy.run_path(str(ROOT / 'megatron_mhc' / 'compat.py'))['TRITON_TESTED']


def overlay(folder: Path, version: str) -> Path:
    """The folder that holds this Triton; PYTHONPATH takes it."""
    path = folder / f'triton-{version}'
    if not (path / 'triton').is_dir():
        pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', path]
        subprocess.run([*pip, f'triton=={version}'], check=True)
    return path


def report(path: Path, version: str, record: Path, *options: str) -> dict:
    """The report of one Triton, held against nothing but the exceptions."""
    print(f'Triton {version}', file=sys.stderr)
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    command = [sys.executable, '-m', 'megatron_mhc', 'kernels', 'report', '--json', '--record']
    result = subprocess.run(
        [*command, str(record), *options],
        env=env | {'PYTHONPATH': f'{path}{os.pathsep}{ROOT}'},
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode not in (0, 1):
        raise SystemExit(result.returncode)
    found = json.loads(result.stdout)
    if found['triton'].split('+')[0] != version:
        raise SystemExit(
            f'{path}: holds Triton {found["triton"]}, not {version}; remove the folder'
        )
    for row in found['kernels']:
        if row['problems']:
            where = f'{row["kernel"]} (n={row["num_streams"]}, sm_{row["arch"]})'
            raise SystemExit(
                f'Triton {version}, {where}: {"; ".join(row["problems"])}: not recorded'
            )
    return found


def merged(reports: list[dict]) -> dict[str, dict]:
    """``kernel n`` -> sm -> state, a list by version where versions differ."""
    states: dict = {}
    for found in reports:
        for row in found['kernels']:
            archs = states.setdefault(f'{row["kernel"]} {row["num_streams"]}', {})
            archs.setdefault(str(row['arch']), []).append(f'{row["warps"]} {row["mma"]}')
    return {
        name: {arch: seen if len(set(seen)) > 1 else seen[0] for arch, seen in archs.items()}
        for name, archs in sorted(states.items())
    }


def predicted(reports: list[dict]) -> dict:
    """``kernel n`` -> percent of a copy that the model predicts, by version; null for none."""
    percents: dict[str, list[float | None]] = {}
    for place, found in enumerate(reports):
        for row in found['kernels']:
            if row['num_streams'] == RECORDED_STREAMS and row.get('predicted'):
                gpu, name = row['predicted']['gpu'], f'{row["kernel"]} {row["num_streams"]}'
                seen = percents.setdefault(name, [None] * len(reports))
                seen[place] = row['predicted']['copy_percent']
    shape = {key: reports[0][key] for key in ('hidden_size', 'tokens')}
    return {'gpu': gpu, **shape, 'kernels': dict(sorted(percents.items()))}


def renewed(record: dict, reports: list[dict], options: argparse.Namespace) -> dict:
    """The record with what the reports found; rows that they were not asked for stay."""
    before = record if options.kernel else {'predicted': {'kernels': {}}, 'kernels': {}}
    shares, kernels = predicted(reports), merged(reports)
    shares['kernels'] = dict(
        sorted({**before['predicted']['kernels'], **shares['kernels']}.items())
    )
    record = record | {'triton': [*VERSIONS], 'predicted': shares}
    if options.predictions:
        return record
    return record | {'kernels': dict(sorted({**before['kernels'], **kernels}.items()))}


def lines(rows: dict, indent: str) -> str:
    """One entry a line."""
    return f',\n{indent}'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in rows.items())


def text(record: dict) -> str:
    """JSON with one exception, and one kernel, a line."""
    exceptions = ',\n  '.join(json.dumps(noted) for noted in record['exceptions'])
    shape = {key: value for key, value in record['predicted'].items() if key != 'kernels'}
    return (
        f'{{\n "triton": {json.dumps(record["triton"])},\n "dtype": "bf16",\n'
        f' "exceptions": [\n  {exceptions}\n ],\n'
        f' "predicted": {{\n  {lines(shape, "  ")},\n  "kernels": {{\n   '
        f'{lines(record["predicted"]["kernels"], "   ")}\n  }}\n }},\n'
        f' "kernels": {{\n  {lines(record["kernels"], "  ")}\n }}\n}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--overlays', type=Path, default=ROOT / '.cache', help='folder of the Triton folders')
    add('--predictions', action='store_true', help='leave all but the predictions as it is')
    add('--kernel', nargs='+', default=[], help='leave all but rows that begin like this as it is')
    options = parser.parse_args()
    record = json.loads(RECORD.read_text())
    if options.kernel and record['triton'] != [*VERSIONS]:
        parser.error(
            f'argument --kernel: {" ".join(options.kernel)}: the record is of Triton '
            f'{" ".join(record["triton"])}, not {" ".join(VERSIONS)}; record all kernels'
        )
    short = ['--roofline', '--num-streams', str(RECORDED_STREAMS)] if options.predictions else []
    if options.kernel:
        short += ['--kernel', *options.kernel]
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(record | {'triton': [], 'kernels': {}}, file)
        file.flush()
        name = Path(file.name)
        folder = options.overlays
        reports = [report(overlay(folder, v), v, name, *short) for v in VERSIONS]
    RECORD.write_text(text(renewed(record, reports, options)))


if __name__ == '__main__':
    main()
