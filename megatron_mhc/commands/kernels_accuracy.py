"""``megatron-mhc kernels accuracy``: the Triton kernels against fp64 on this machine.

Runs every op forward and backward on random inputs and prints the relative RMS error of each output
and gradient with its bound.
"""

from __future__ import annotations

import argparse
import os
import secrets
from typing import Any

from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.kernels.defaults import ACCURACY_SIZES, DTYPES

PROGRAM = 'megatron-mhc kernels accuracy'


def main(options: argparse.Namespace) -> int:
    """Print the table; 1 when an error exceeds its bound, else 0."""
    import torch

    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        refuse(PROGRAM, 'argument --device: cuda: torch finds no GPU; use --device cpu')
    if device == 'cpu' and not os.environ.get('TRITON_INTERPRET'):
        refuse(
            PROGRAM, 'argument --device: cpu: kernels run there interpreted; set TRITON_INTERPRET=1'
        )
    try:
        import triton
    except ModuleNotFoundError:
        refuse(PROGRAM, "Triton is not installed; pip install 'megatron-mhc[kernels]'")
    from megatron_mhc.kernels.accuracy import OPS, TRUNCATES, accuracy_table
    from megatron_mhc.kernels.triton.launch import interpreted

    hidden_size, tokens = ACCURACY_SIZES[device]
    shape = {
        'num_streams': options.num_streams,
        'channels': options.hidden_size or hidden_size,
        'tokens': options.tokens or tokens,
        'seed': secrets.randbits(32) if options.seed is None else options.seed,
    }
    try:
        with progress(len(OPS), 'ops') as advance:
            dtype = getattr(torch, DTYPES[options.dtype])
            rows = accuracy_table(torch.device(device), dtype, **shape, advance=advance)
    except ValueError as error:
        refuse(PROGRAM, f'--device {device}: {error}')
    found = {
        'triton': triton.__version__,
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu, interpreted',
        'dtype': options.dtype,
        **shape,
        'note': TRUNCATES if interpreted() and options.dtype == 'bf16' else None,
        'rows': [row._asdict() for row in rows],
        'ok': all(row.ok for row in rows),
    }
    if options.json:
        print(as_json(found))
    else:
        _print(found)
    return int(not found['ok'])


def _print(found: dict[str, Any]) -> None:
    size = f'n = {found["num_streams"]}, C = {found["channels"]}, {found["tokens"]} tokens'
    print(f'{found["device"]}, {found["dtype"]}, {size}, seed {found["seed"]}')
    print('error: relative RMS against fp64 of the same rounded inputs; bound 0: bit for bit\n')
    cells = [('op', 'quantity', 'error', 'bound', 'verdict')]
    for row in found['rows']:
        numbers = (f'{row["error"]:.1e}', f'{row["bound"]:.1e}')
        cells.append((row['op'], row['quantity'], *numbers, 'ok' if row['ok'] else 'FAIL'))
    print(*table(cells, '<<>><'), sep='\n')
    if found['note']:
        print(f'\n{found["note"]}')
