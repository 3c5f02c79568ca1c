"""``megatron-mhc kernels report``: what every shipped kernel takes on a GPU, found without one.

Compiles the kernels of a training step with the Triton that Python finds, judges them (spills,
room, vector width, matrix units, occupancy and predicted speed beside ``kernels/record.json``),
then prints what each form of the residual reads and writes (mHC, Table 2, and ours).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mhc.commands.kernels_roofline import chosen, fields, lines, roofline, shown_before
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.kernels.defaults import DTYPES
from megatron_mhc.kernels.roofline.launches import (
    MARGIN,
    Shape,
    lost_percent,
    predict_launch,
    recorded_percent,
)
from megatron_mhc.kernels.roofline.predict import LABEL
from megatron_mhc.kernels.traffic import Traffic, our_forms, paper_forms
from megatron_mhc.kernels.verdict import VECTOR_BITS, judge, label, recorded, resident_warps

if TYPE_CHECKING:
    from megatron_mhc.kernels.offline import Resources
    from megatron_mhc.kernels.roofline.gpus import Gpu
    from megatron_mhc.kernels.triton.launch import Launch

PROGRAM = 'megatron-mhc kernels report'


def main(options: argparse.Namespace) -> int:
    """Print the report; 1 when a kernel is not as it should be, else 0."""
    try:
        found = report(options)
    except ModuleNotFoundError as error:
        if error.name != 'triton':
            raise
        refuse(PROGRAM, "Triton is not installed; pip install 'megatron-mhc[kernels]'")
    except (RuntimeError, ValueError) as error:
        refuse(PROGRAM, str(error))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return int(not found['ok'])


def report(options: argparse.Namespace) -> dict[str, Any]:
    """The report as plain values.

    Raises:
        RuntimeError: Triton interprets kernels, or a tool is missing; ValueError: no kernel has the
            name asked for, or ``--gpu`` and the other options do not go together.
    """
    gpu, architectures = chosen(options)
    import torch
    import triton

    from megatron_mhc.kernels.offline import compile_launches, require_compiler
    from megatron_mhc.kernels.shipped import shipped_launches

    require_compiler()
    dtype = getattr(torch, DTYPES[options.dtype])
    shape = (options.hidden_size, options.tokens, dtype)
    launches = [launch for n in options.num_streams for launch in shipped_launches(n, *shape)]
    if options.kernel:
        names = sorted({launch.name.removesuffix('_kernel') for launch in launches})
        launches = [
            launch for launch in launches if label(launch).startswith(tuple(options.kernel))
        ]
        if not launches:
            wanted = ' '.join(options.kernel)
            raise ValueError(f'argument --kernel: {wanted}: no such kernel; one of {names}')
    asked_shape = Shape(options.hidden_size, options.tokens, options.dtype)
    measured = shown_before(gpu, asked_shape) if options.roofline else {}
    pairs = [(launch, arch) for launch in launches for arch in architectures]
    start = time.perf_counter()
    place = Path(triton.__file__).parent
    print(f'{PROGRAM}: {len(pairs)} to compile', file=sys.stderr)
    rows = []
    with progress(len(pairs), 'kernels') as advance:
        results = compile_launches(pairs, gpus={gpu.arch: gpu})
        asked = (options.record, triton.__version__, gpu, asked_shape)
        for (launch, arch), result in zip(pairs, results, strict=True):
            rows.append(_row(launch, arch, result, *asked))
            advance(1)
    found = {
        'triton': triton.__version__,
        'triton_path': str(place),
        'torch': torch.__version__,
        'on_record': options.record['triton'],
        'hidden_size': options.hidden_size,
        'tokens': options.tokens,
        'dtype': options.dtype,
        'seconds': round(time.perf_counter() - start, 1),
        'kernels': rows,
        'traffic': [
            _traffic(name, n, form, form.bytes(options.tokens, options.hidden_size, dtype.itemsize))
            for n in options.num_streams
            for name, form in (paper_forms(n) | our_forms(n)).items()
        ],
        'ok': not any(row['problems'] for row in rows),
    }
    if options.roofline:
        found['roofline'] = roofline(rows, gpu, asked_shape, dtype.itemsize, measured)
    if options.peers:
        from megatron_mhc.commands.kernels_peers import beside

        sublayers = found['roofline']['sublayers']
        found['roofline']['peers'] = beside(options.peers, sublayers, gpu, asked_shape)
    return found


def _row(
    launch: Launch,
    arch: int,
    found: Resources | RuntimeError,
    record: dict[str, Any],
    version: str,
    gpu: Gpu,
    shape: Shape,
) -> dict[str, Any]:
    row = {'kernel': label(launch), 'num_streams': launch.constants['N'], 'arch': arch}
    if isinstance(found, RuntimeError):
        return row | {'problems': [str(found)], 'notes': []}
    wanted = recorded(launch, arch, record, version, shape.dtype)
    warps = resident_warps(arch, found, launch.options['num_warps'])
    row |= asdict(replace(found, profile=None)) | {'warps': warps, 'compared': wanted is not None}
    del row['profile']
    slower = []
    if arch == gpu.arch:
        prediction, percent = None, recorded_percent(launch, gpu, shape, record, version)
        try:
            prediction = predict_launch(launch, found, gpu)
            row['predicted'] = fields(prediction, gpu) | {'recorded_percent': percent}
        except ValueError as error:
            row['unpredicted'] = str(error)
        slower = lost_percent(prediction, percent)
    problems, notes = judge(launch, arch, found, record, wanted, slower)
    return row | {'problems': problems, 'notes': notes}


def _traffic(name: str, n: int, form: Traffic, total: int) -> dict[str, Any]:
    return {'num_streams': n, 'form': name, **asdict(form), 'elements': form.elements} | {
        'bytes': total
    }


def _print(found: dict[str, Any]) -> None:
    rows = found['kernels']
    # Said first: which Triton an overlay on PYTHONPATH brings is easily mistaken.
    print(f'Triton {found["triton"]} from {found["triton_path"]}, torch {found["torch"]}')
    header = (
        *('kernel', 'n', 'sm', 'regs', 'spills', 'shared KB', 'warps', '128-bit loads'),
        *('stores', 'MMA', 'verdict'),
    )
    cells: list[tuple[object, ...]] = [header]
    for row in rows:
        verdict = 'FAIL' if row['problems'] else 'noted' if row['notes'] else 'ok'
        start = (row['kernel'], row['num_streams'], row['arch'])
        if 'registers' not in row:
            cells.append((*start, *'-------', verdict))
            continue
        loads = _wide(row['loads'], row['copies'])
        middle = (row['registers'], row['spill_bytes'], f'{row["shared_bytes"] / 1024:.1f}')
        end = (row['warps'], loads, _wide(row['stores']), row['mma'], verdict)
        cells.append((*start, *middle, *end))
    print(*table(cells, '<>>>>>>>><'), sep='\n')
    compiled = f'{len(rows)} compiled in {found["seconds"]} s with Triton {found["triton"]}'
    print(f'\n{compiled}: {_sum(found)}')
    print(_predictions(rows))
    if 'roofline' in found:
        print(*lines(found), sep='\n')
    for title, key in (('noted', 'notes'), ('out of bounds', 'problems')):
        listed: dict[str, list[str]] = {}
        for row in rows:
            for text in row[key]:
                where = f'{row["kernel"]} (n={row["num_streams"]}, sm_{row["arch"]})'
                listed.setdefault(text, []).append(where)
        if listed:
            print(f'\n{title}')
        for text, places in listed.items():
            print(f'  {text}\n    ' + '\n    '.join(places))
    size = f'{found["tokens"]} tokens, C = {found["hidden_size"]}, {found["dtype"]}'
    print(f'\nbytes per sublayer ({size}); vectors of C and fp32 map values per token')
    cells = [('form', 'n', 'reads', 'writes', 'sum', 'map reads', 'map writes', 'MB')]
    keys = ('form', 'num_streams', 'reads', 'writes', 'elements', 'map_reads', 'map_writes')
    for row in found['traffic']:
        cells.append((*(row[key] for key in keys), f'{row["bytes"] / 1e6:.1f}'))
    print(*table(cells, '<>'), sep='\n')


def _sum(found: dict[str, Any]) -> str:
    """What was found in one line, and what was not looked at."""
    rows = found['kernels']
    spilling = sum(bool(row.get('spill_bytes') or row.get('stack_bytes')) for row in rows)
    failing = sum(bool(row['problems']) for row in rows)
    text = f'{spilling or "none"} spilling, {failing or "none"} out of bounds'
    missing = sum(not row.get('compared') for row in rows)
    if not missing:
        return text
    known = ' '.join(found['on_record']) or 'no version'
    what = 'no row has a record' if missing == len(rows) else f'{missing} rows have no record'
    return (
        f'{text}\n{what} of this Triton, dtype and shape ({known} on record): of them only '
        'spills, room, vectors and types of matrix products were judged, not occupancy'
    )


def _predictions(rows: list[dict[str, Any]]) -> str:
    """How many times of the model were held against the record, in one line."""
    seen = [row['predicted'] for row in rows if row.get('predicted')]
    held = sum(row['recorded_percent'] is not None for row in seen)
    text = f'{len(seen)} times {LABEL}' if seen else 'no times predicted'
    if held:
        return f'{text}: {held} held against the record, {MARGIN:.0%} of a share of copy may go'
    return f'{text}: none held against the record, which has none of this Triton, GPU and shape'


def _wide(*counts: dict[int, int]) -> str:
    """``5/9``: accesses of a vector's width or more, of all."""
    merged = [(int(bits), count) for part in counts for bits, count in part.items()]
    wide = sum(count for bits, count in merged if bits >= VECTOR_BITS)
    return f'{wide}/{sum(count for _, count in merged)}'
