"""``megatron-mhc kernels report``: what every shipped kernel takes on a GPU, found without one.

Compiles the kernels of a training step and holds them against ``kernels/ceilings.json``, then
prints what each form of the residual reads and writes (mHC, Table 2, and ours).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_mhc.argument_types import MOST_TOKENS, MOST_WIDTH, input_file, integer
from megatron_mhc.kernels.backend import KERNEL_STREAMS
from megatron_mhc.kernels.traffic import Traffic, arguments, our_forms, paper_forms, stream_names
from megatron_mhc.kernels.traffic import variant as variant_of
from megatron_mhc.refusal import refuse

if TYPE_CHECKING:
    from megatron_mhc.kernels.offline import Resources
    from megatron_mhc.kernels.triton.launch import Launch

PROGRAM = 'megatron-mhc kernels report'
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
# KiB of shared memory that one block may take, by architecture (CUDA programming guide).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
CEILINGS = Path(__file__).parent / 'kernels' / 'ceilings.json'
VECTOR_BITS = 128
# Triton takes an integer for aligned only if 16 divides it.
ALIGNED_CHANNELS = 16


def add_parser(commands: Any) -> None:
    """Add ``report`` to the subcommands of ``megatron-mhc kernels``."""
    parser = commands.add_parser(
        'report',
        help='compile every kernel, without a GPU, and check what it takes',
        description=__doc__.partition('\n\n')[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--arch', type=_arch, nargs='+', default=[80, 90, 100], help='compute capabilities')
    add('--num-streams', type=_streams, nargs='+', default=[2, 4], help='n')
    add('--hidden-size', type=integer(1, MOST_WIDTH), default=4096, help='C')
    add('--tokens', type=integer(1, MOST_TOKENS), default=8192, help='T, sequence times microbatch')
    add('--dtype', type=_dtype, default='bf16', help='of the streams: bf16, fp16 or fp32')
    add('--kernel', nargs='+', default=None, help='only kernels whose name begins like this')
    add('--ceilings', type=input_file, default=CEILINGS, help='JSON file with ceilings')
    add('--json', action='store_true', help='print one JSON object')
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Print the report; 1 when a kernel exceeds a ceiling, else 0."""
    try:
        ceilings = json.loads(options.ceilings.read_text())
    except (OSError, ValueError) as error:
        refuse(PROGRAM, f'argument --ceilings: {options.ceilings}: {error}; leave it out')
    try:
        found = report(options, ceilings)
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


def report(options: argparse.Namespace, ceilings: dict) -> dict:
    """The report as plain values.

    Raises:
        RuntimeError: Triton interprets kernels; ValueError: no kernel has the name asked for.
    """
    import triton

    from megatron_mhc.kernels.offline import compile_launches, require_compiler
    from megatron_mhc.kernels.shipped import shipped_launches

    require_compiler()
    shape = (options.hidden_size, options.tokens, DTYPES[options.dtype])
    launches = [launch for n in options.num_streams for launch in shipped_launches(n, *shape)]
    if options.kernel:
        names = sorted({launch.name.removesuffix('_kernel') for launch in launches})
        launches = [launch for launch in launches if launch.name.startswith(tuple(options.kernel))]
        if not launches:
            wanted = ' '.join(options.kernel)
            raise ValueError(f'argument --kernel: {wanted}: no such kernel; one of {names}')
    pairs = [(launch, arch) for launch in launches for arch in options.arch]
    start = time.perf_counter()
    print(f'{PROGRAM}: {len(pairs)} to compile, Triton {triton.__version__}', file=sys.stderr)
    results = _progress(compile_launches(pairs), len(pairs))
    rows = [
        _row(launch, arch, result, ceilings, options.dtype)
        for (launch, arch), result in zip(pairs, results, strict=True)
    ]
    itemsize = DTYPES[options.dtype].itemsize
    return {
        'triton': triton.__version__,
        'hidden_size': options.hidden_size,
        'tokens': options.tokens,
        'dtype': options.dtype,
        'seconds': round(time.perf_counter() - start, 1),
        'kernels': rows,
        'traffic': [
            _traffic(name, n, form, form.bytes(options.tokens, options.hidden_size, itemsize))
            for n in options.num_streams
            for name, form in (paper_forms(n) | our_forms(n)).items()
        ],
        'ok': not any(row['problems'] for row in rows),
    }


def check(
    launch: Launch, arch: int, found: Resources, ceilings: dict, dtype: str
) -> tuple[list[str], list[str]]:
    """Problems of a compiled kernel with their remedies, and reasons why others are none."""
    n, kernel = launch.constants['N'], variant_of(launch)
    problems = []
    if found.spill_bytes or found.stack_bytes:
        spilled = found.spill_bytes or found.stack_bytes
        problems.append(('spill', spilled, f'spills {spilled} bytes: smaller tile or more warps'))
    room = SHARED_KIB[arch] * 1024
    if found.shared_bytes > room:
        text = f'{found.shared_bytes} bytes of shared memory, sm_{arch} has {room}: smaller tile'
        problems.append(('room', found.shared_bytes, text + ' or fewer stages'))
    if arguments(launch).get('C', 1) % ALIGNED_CHANNELS == 0:
        narrow = {name: found.narrowest.get(name, VECTOR_BITS) for name in stream_names(launch)}
        if narrow and min(narrow.values()) < VECTOR_BITS:
            names = ' '.join(name for name, bits in narrow.items() if bits < VECTOR_BITS)
            bits = min(narrow.values())
            text = f'{names}: {bits} bits an access, not {VECTOR_BITS}: wider tile or fewer warps'
            problems.append(('vector', -bits, text))
    limits = ceilings['kernels'].get(kernel, {}).get(str(n), {}).get(str(arch))
    # Masked tails and other dtypes compile to other code than the ceilings were measured on.
    if limits and dtype == ceilings['dtype'] and launch.constants.get('EVEN', True):
        for what in ('registers', 'shared_bytes'):
            value = getattr(found, what)
            if value > limits[what]:
                text = f'{what} {value}, ceiling {limits[what]}: mend it, or raise the ceiling'
                problems.append((what, value, text))
        if not set(found.mma.split()) <= set(limits['mma'].split()):
            text = f'matrix instructions {found.mma}, not {limits["mma"]}: operands changed type'
            problems.append(('mma', 0, text))
    excused = {}
    for rule, value, text in problems:
        for noted in ceilings['exceptions']:
            known = kernel.startswith(noted['kernel']) and rule == noted['rule']
            known = known and n in noted['num_streams'] and arch in noted['arch']
            # Of an access a limit says how narrow it may be, of all else how much there may be.
            if known and value <= noted['limit'] * (-1 if rule == 'vector' else 1):
                excused[text] = f'{text} ({noted["reason"]})'
    return [text for _, _, text in problems if text not in excused], list(excused.values())


def _row(
    launch: Launch, arch: int, found: Resources | RuntimeError, ceilings: dict, dtype: str
) -> dict:
    flags = [name for name in ('HAS_BIAS', 'DROPOUT') if launch.constants.get(name)]
    words = ' '.join([variant_of(launch), *flags]).replace('HAS_', '').replace('WRITE_', '')
    row = {'kernel': words.lower(), 'num_streams': launch.constants['N'], 'arch': arch}
    if isinstance(found, RuntimeError):
        return row | {'problems': [str(found)], 'notes': []}
    problems, notes = check(launch, arch, found, ceilings, dtype)
    return row | asdict(found) | {'problems': problems, 'notes': notes}


def _traffic(name: str, n: int, form: Traffic, total: int) -> dict:
    return {'num_streams': n, 'form': name, **asdict(form), 'elements': form.elements} | {
        'bytes': total
    }


def _progress(results: Iterable, total: int) -> Iterator:
    """Count ``results`` on stderr where a person reads it."""
    if not sys.stderr.isatty():
        return iter(results)
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _count(results, total)
    return iter(tqdm(results, total=total, file=sys.stderr, leave=False))


def _count(results: Iterable, total: int) -> Iterator:
    for done, result in enumerate(results, 1):
        print(f'\r{done}/{total}', end='' if done < total else '\n', file=sys.stderr, flush=True)
        yield result


def _print(found: dict) -> None:
    rows = found['kernels']
    header = ('kernel', 'n', 'sm', 'regs', 'spills', 'shared KB', '128-bit loads', 'stores', 'MMA')
    layout = '{:34} {:>2} {:>4} {:>5} {:>6} {:>9} {:>13} {:>7} {:16} {}'
    print(layout.format(*header, 'verdict'))
    for row in rows:
        verdict = 'FAIL' if row['problems'] else 'noted' if row['notes'] else 'ok'
        start = (row['kernel'], row['num_streams'], row['arch'])
        if 'registers' not in row:
            print(layout.format(*start, *'------', verdict))
            continue
        loads = _wide(row['loads'], row['copies'])
        middle = (row['registers'], row['spill_bytes'], f'{row["shared_bytes"] / 1024:.1f}')
        print(layout.format(*start, *middle, loads, _wide(row['stores']), row['mma'], verdict))
    print(f'\n{len(rows)} compiled in {found["seconds"]} s with Triton {found["triton"]}')
    for title, key in (('noted', 'notes'), ('out of bounds', 'problems')):
        listed = {}
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
    layout = '{:26} {:>2} {:>6} {:>7} {:>6} {:>10} {:>11} {:>9}'
    print(layout.format('form', 'n', 'reads', 'writes', 'sum', 'map reads', 'map writes', 'MB'))
    for row in found['traffic']:
        numbers = [row[key] for key in ('reads', 'writes', 'elements', 'map_reads', 'map_writes')]
        megabytes = f'{row["bytes"] / 1e6:.1f}'
        print(layout.format(row['form'], row['num_streams'], *numbers, megabytes))


def _wide(*counts: dict[int, int]) -> str:
    """``5/9``: accesses of a vector's width or more, of all."""
    merged = [(int(bits), count) for part in counts for bits, count in part.items()]
    wide = sum(count for bits, count in merged if bits >= VECTOR_BITS)
    return f'{wide}/{sum(count for _, count in merged)}'


def _arch(text: str) -> int:
    return _one_of(text, SHARED_KIB, 'the kernels are checked for sm_80 and later')


def _streams(text: str) -> int:
    return _one_of(text, KERNEL_STREAMS, 'the kernels are written for some numbers of streams')


def _dtype(text: str) -> str:
    return _one_of(text, DTYPES, 'no kernel takes it')


def _one_of(text: str, known: Iterable, why: str) -> Any:
    found = {str(value): value for value in known}
    if text not in found:
        raise argparse.ArgumentTypeError(f'{text}: {why}; take one of {" ".join(found)}')
    return found[text]
