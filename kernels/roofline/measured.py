"""Times of kernels that a GPU has shown, to stand beside what the model predicts.

A run keeps them in ``kernels.json`` of its folder, a JSON object for one GPU and shape::

    {"gpu": "h200", "hidden_size": 4096, "tokens": 8192, "dtype": "bf16", "triton": "3.8.0",
     "date": "2026-12-01", "microseconds": {"post_res_backward 4": 180.5}}

with kernels named as the report names them, and n behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mhc.kernels.roofline.launches import Shape

FILE = 'kernels.json'
KEYS = {'gpu', 'hidden_size', 'tokens', 'dtype', 'triton', 'date', 'microseconds'}


def measured(folder: Path, gpu: str, shape: Shape) -> dict[str, tuple[float, str]]:
    """``kernel n`` -> microseconds and where they are from; of several runs the newest counts.

    Args:
        folder: holds one folder for each run; it may be absent.
        gpu: its name in ``gpus``.

    Raises:
        ValueError: a file is not of the form above.
    """
    runs = [(path, _run(path)) for path in folder.glob(f'*/{FILE}')]
    found: dict[str, tuple[float, str]] = {}
    for path, run in sorted(runs, key=lambda item: item[1]['date']):
        if run['gpu'] == gpu and Shape(run['hidden_size'], run['tokens'], run['dtype']) == shape:
            source = f'{path.parent.name}, Triton {run["triton"]}'
            found |= {name: (float(us), source) for name, us in run['microseconds'].items()}
    return found


def _run(path: Path) -> dict[str, Any]:
    try:
        run: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: {error}; mend or remove it') from None
    if not isinstance(run, dict) or not KEYS <= run.keys():
        wanted = ', '.join(sorted(KEYS))
        raise ValueError(f'{path}: no measured kernels, which have the keys {wanted}; mend it')
    return run
