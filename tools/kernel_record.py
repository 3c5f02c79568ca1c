#!/usr/bin/env python3
"""Make kernels/record.json anew with every supported Triton, after kernels have changed on purpose.

    python tools/kernel_record.py

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
VERSIONS = runpy.run_path(str(ROOT / 'megatron_mhc' / 'compat.py'))['TRITON_TESTED']


def overlay(folder: Path, version: str) -> Path:
    """The folder that holds this Triton; PYTHONPATH takes it."""
    path = folder / f'triton-{version}'
    if not (path / 'triton').is_dir():
        pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', path]
        subprocess.run([*pip, f'triton=={version}'], check=True)
    return path


def report(path: Path, version: str, record: Path) -> dict:
    """The report of one Triton, held against nothing but the exceptions."""
    print(f'Triton {version}', file=sys.stderr)
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    command = [sys.executable, '-m', 'megatron_mhc', 'kernels', 'report', '--json', '--record']
    result = subprocess.run(
        [*command, str(record)],
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


def text(record: dict) -> str:
    """JSON with one exception, and one kernel, a line."""
    exceptions = ',\n  '.join(json.dumps(noted) for noted in record['exceptions'])
    lines = (f'{json.dumps(name)}: {json.dumps(s)}' for name, s in record['kernels'].items())
    kernels = ',\n  '.join(lines)
    return (
        f'{{\n "triton": {json.dumps(record["triton"])},\n "dtype": "bf16",\n'
        f' "exceptions": [\n  {exceptions}\n ],\n "kernels": {{\n  {kernels}\n }}\n}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--overlays', type=Path, default=ROOT / '.cache', help='folder of the Triton folders')
    folder = parser.parse_args().overlays
    record = json.loads(RECORD.read_text())
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(record | {'triton': [], 'kernels': {}}, file)
        file.flush()
        name = Path(file.name)
        reports = [report(overlay(folder, version), version, name) for version in VERSIONS]
    record['triton'] = [*VERSIONS]
    record['kernels'] = merged(reports)
    RECORD.write_text(text(record))


if __name__ == '__main__':
    main()
