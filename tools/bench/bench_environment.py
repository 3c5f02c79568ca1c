"""What a figure depends on besides the code: machine, versions, command, date."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 'unknown'
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else 'unknown'


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'


def device_name(device: str) -> str:
    if device == 'cpu':
        return f'CPU {platform.machine()}'
    import torch

    return torch.cuda.get_device_name(0)


def new_folder(results: Path, device: str) -> Path:
    """``<gpu>-<date>`` in ``results``, numbered where that is taken."""
    name = re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')
    folder = results / f'{name}-{datetime.date.today():%Y-%m-%d}'
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f'{name}-{datetime.date.today():%Y-%m-%d}-{number}')
    return folder


def describe(device: str, argv: list[str], script: str = 'bench.py') -> dict[str, str]:
    """Label to value, in the order of the report's header."""
    import torch
    from bench_timer import l2_bytes

    changed = _first_line('git', 'status', '--porcelain', '--untracked-files=no') != 'unknown'
    commit = _first_line('git', 'rev-parse', '--short=12', 'HEAD')
    facts = {
        'device': device_name(device),
        'date': f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC',
        'command': shlex.join(['python', f'tools/bench/{script}', *argv]),
        'commit': f'{commit} with local changes' if changed else commit,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'triton': _version('triton'),
    }
    if device != 'cpu':
        properties = torch.cuda.get_device_properties(0)
        query = ('nvidia-smi', '--format=csv,noheader', '--id=0')
        facts |= {
            'driver': _first_line(*query, '--query-gpu=driver_version'),
            'clocks now, max (SM, memory)': _first_line(
                *query, '--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem'
            ),
            'CUDA of torch': str(torch.version.cuda),
            'SMs, L2': f'{properties.multi_processor_count}, {l2_bytes() >> 20} MiB',
        }
    else:
        facts['note'] = 'on a CPU the bench shows that it works; no time here means anything'
    return facts


if __name__ == '__main__':
    # ``bench_environment.py DEVICE SCRIPT ARGS...``: as JSON.
    device, script, *rest = sys.argv[1:]
    print(json.dumps(describe(device, rest, script), indent=2))
