"""What ``megatron-mhc convert`` says of streams, and of another layout of them."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from megatron_mhc.convert.choices import FLAGS, HF
from megatron_mhc.convert.conversion import Converted, Progress, convert
from megatron_mhc.convert.layouts import SINKHORN
from megatron_mhc.convert.told import Told, tell_verified
from megatron_mhc.inputs.table import table
from megatron_mhc.kernels.numerics import NUMERICS, PAPER


def answer(options: argparse.Namespace, given: dict[str, Any], progress: Progress) -> Told:
    """Convert; ``given`` are options of new streams."""
    if vain := [FLAGS[name] for name in ('gated_rank', 'attention_block_size') if name in given]:
        raise ValueError(
            f'{vain[0]}: no effect with --to {options.to}; use --to gated or attention, or leave '
            'it out'
        )
    report = convert(
        options.source,
        options.destination,
        options.to,
        origin='auto' if options.origin == HF else options.origin,
        step=options.step,
        upcycling=given,
        dry_run=options.dry_run,
        verify=options.verify,
        overwrite=options.overwrite,
        unchecked=options.unchecked,
        numerics=options.mhc_numerics,
        progress=progress,
    )
    load = _how_to_load(report, options.destination)
    plain = _plain(report) | {'load': None if options.dry_run else load}
    return Told(plain, lambda: _print(report), load)


def _plain(report: Converted) -> dict[str, Any]:
    """What a conversion did, as plain values."""
    streams = report.streams
    return {
        'from': report.origin,
        'to': report.target,
        'layers': len(streams.layers),
        'num_residual_streams': streams.num_streams,
        'hidden_size': streams.hidden_size,
        'sinkhorn_iterations': streams.iterations,
        'stream_merge': _merge(report),
        'numerics': streams.numerics,
        'mapping': [row._asdict() for row in report.rows],
        'carried': report.carried,
        'left_out': report.left_out,
        'bytes': report.nbytes,
        'differences': report.differences,
        'verified': report.verified or None,
    }


def _merge(report: Converted) -> str:
    if report.streams.single_pass:
        return 'pre'
    return 'mean' if report.streams.head is None else 'learned'


def _print(report: Converted) -> None:
    from megatron_mhc.convert.maps import RMS, TOKENS

    streams = report.streams
    print(
        f'{report.origin} -> {report.target}: {len(streams.layers)} layers, n = '
        f'{streams.num_streams}, C = {streams.hidden_size}, {streams.iterations} iterations, merge '
        f'{_merge(report)}'
    )
    header = ('from', 'to', 'shape', 'how')
    for line in table([header, *((a, b, list(shape), how) for a, b, shape, how in report.rows)]):
        print(f'  {line}')
    print(f'  {report.carried} other entries under their own names; {report.nbytes:,} bytes in all')
    print(f'  {report.left_out} entries of the run left out: optimizer, random states')
    off = {name: size for name, size in report.differences.items() if size}
    if off:
        sizes = ', '.join(f'{name} {size:.1e}' for name, size in off.items())
        print(
            f'not carried over, largest difference on {TOKENS} random tokens of rms {RMS[0]} to '
            f'{RMS[1]}: {sizes}'
        )
    tell_verified(report.verified)


def _how_to_load(report: Converted, destination: pathlib.Path) -> str:
    if report.target == 'mhc':
        streams = report.streams
        flags = ['--residual-type mhc', f'--mhc-num-residual-streams {streams.num_streams}']
        if streams.manifold == SINKHORN:
            flags.append(f'--mhc-sinkhorn-iterations {streams.iterations}')
        else:
            flags.append(f'--mhc-manifold {streams.manifold}')
        if streams.single_pass:
            flags.append('--mhc-single-pass')
        if streams.head is not None:
            flags.append('--mhc-stream-merge learned')
        if streams.numerics != PAPER:
            flags.append(f'--mhc-numerics {streams.numerics}')
        if streams.norm_eps != NUMERICS[streams.numerics].norm_eps:
            flags.append(f'--mhc-norm-eps {streams.norm_eps:g}')
        return f'train on with --load {destination} {" ".join(flags)}'
    return f'a new optimizer starts from iteration 0: {destination} is a release'
