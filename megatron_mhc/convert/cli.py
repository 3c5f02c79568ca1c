"""``megatron-mhc convert``: give a checkpoint streams, or another layout of those it has."""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
import time

from megatron_mhc.convert.choices import FLAGS, HF, MEGATRON, MODEL_CLASSES, STANDARD, TARGETS
from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.options import STEP, STREAMS, add_option
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.inputs.values import MOST_TOKENS, integer, number
from megatron_mhc.kernels.defaults import NORM_EPS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from megatron_mhc.convert.conversion import Converted

COMMAND = 'megatron-mhc convert'
_ORIGINS = ('auto', STANDARD, *TARGETS, HF)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc convert``."""
    parser.set_defaults(answer=__name__)
    parser.description = 'Convert a checkpoint offline. SRC is only read; DST appears when whole.'
    parser.add_argument(
        'source',
        metavar='SRC',
        type=pathlib.Path,
        help='what --load names (torch_dist, or torch of one file), or a folder of safetensors',
    )
    parser.add_argument('destination', metavar='DST', type=pathlib.Path, help='a new folder')
    parser.add_argument(
        '--to',
        required=True,
        choices=(targets := (*TARGETS, *MODEL_CLASSES, HF, MEGATRON)),
        metavar='LAYOUT',
        help=f'layout of the output: {", ".join(targets)}; mhc is ours, hybrid and gpt are the '
        'class of the model, for the same run, hf is for transformers, megatron the way back',
    )
    parser.add_argument(
        '--from',
        dest='origin',
        default='auto',
        choices=_ORIGINS,
        metavar='LAYOUT',
        help=f'layout of SRC: {", ".join(_ORIGINS)} (default: auto, by its saved arguments)',
    )
    add_option(
        parser.add_argument,
        STEP,
        type=integer(0, MOST_TOKENS),
        help='iteration of SRC (default: the latest, by its tracker file)',
    )
    parser.add_argument(
        '--no-optim',
        action='store_true',
        help='hybrid, gpt: leave out optimizer state; then train on with --no-load-optim',
    )
    group = parser.add_argument_group('streams for a standard model, exact at step 0')
    # Here as the launcher has it: help and messages name what a run takes.
    add_option(
        group.add_argument,
        STREAMS[::-1],
        dest='mhc_num_residual_streams',
        type=integer(),
        metavar='N',
        help='n >= 2 (default: 4)',
    )
    group.add_argument(
        '--mhc-sinkhorn-iterations', type=integer(), metavar='T', help='passes (default: 20)'
    )
    group.add_argument(
        '--mhc-stream-merge',
        choices=('mean', 'learned', 'sum'),
        help='exact for mean and learned (default: mean)',
    )
    group.add_argument(
        '--mhc-norm-eps',
        type=number(),
        metavar='EPS',
        help='of the norm of streams (default: 1e-6)',
    )
    group.add_argument(
        '--mhc-init-gating-factor', type=number(), metavar='ALPHA', help='alpha > 0 (default: 0.01)'
    )
    group.add_argument(
        '--break-symmetry',
        type=number(),
        metavar='STD',
        help='add normal noise to the biases of all maps: streams part at once, and the model is '
        'no longer exact (default: 0; home streams part them from the first step on)',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='print the mapping table and write nothing'
    )
    parser.add_argument(
        '--verify',
        action='store_true',
        help='run both models on random tokens, in fp32 on the CPU, and compare their logits',
    )
    parser.add_argument(
        '--unchecked',
        action='store_true',
        help='convert without comparing SRC with the model that its saved arguments describe: for '
        'models that pretrain_gpt.py does not build',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace the checkpoint DST, once the new is whole'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')


def main(options: argparse.Namespace) -> int:
    """Convert and tell; 0."""
    # As on Ctrl-C, what was begun is taken away again.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given = {
        name: value
        for name, flag in FLAGS.items()
        if (value := getattr(options, flag.lstrip('-').replace('-', '_'))) is not None
    }
    if options.to in MODEL_CLASSES:
        return _move(options, list(given))
    if options.no_optim:
        refuse(COMMAND, f'--no-optim: --to {options.to} leaves it out always; drop the flag')
    if options.to in (HF, MEGATRON):
        from megatron_mhc.convert.hf import answer

        return answer.main(options, given)
    from megatron_mhc.convert.conversion import convert

    started = time.monotonic()
    try:
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
            progress=lambda nbytes: progress(nbytes, 'written', 'B'),
        )
    except (ValueError, OSError) as error:
        refuse(COMMAND, str(error))
    seconds = time.monotonic() - started
    load = None if options.dry_run else _how_to_load(report, options.destination)
    if options.json:
        print(as_json(_plain(report) | {'seconds': round(seconds, 1), 'load': load}))
        return 0
    _print(report)
    if load is None:
        print('dry run: nothing was written')
    else:
        print(f'wrote {options.destination} in {seconds:.1f} s\n{load}')
    return 0


def _move(options: argparse.Namespace, given: list[str]) -> int:
    flags = [FLAGS[name] for name in given] + ['--from'] * (options.origin != 'auto')
    if flags:
        refuse(
            COMMAND,
            f'{flags[0]}: --to {options.to} keeps the residual connections as they are; drop the '
            'flag, or convert twice',
        )
    from megatron_mhc.convert.model_class import move
    from megatron_mhc.convert.report import how_to_go_on, plain, tell

    started = time.monotonic()
    try:
        report = move(
            options.source,
            options.destination,
            options.to,
            step=options.step,
            optimizer=not options.no_optim,
            dry_run=options.dry_run,
            verify=options.verify,
            overwrite=options.overwrite,
            unchecked=options.unchecked,
            progress=lambda nbytes: progress(nbytes, 'written', 'B'),
        )
    except (ValueError, OSError) as error:
        refuse(COMMAND, str(error))
    seconds = time.monotonic() - started
    load = None if options.dry_run else how_to_go_on(report, options.destination)
    if options.json:
        print(as_json(plain(report) | {'seconds': round(seconds, 1), 'load': load}))
        return 0
    tell(report)
    if load is None:
        print('dry run: nothing was written')
    else:
        print(f'wrote {options.destination} in {seconds:.1f} s\n{load}')
    return 0


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
        'mapping': [row._asdict() for row in report.rows],
        'carried': report.carried,
        'left_out': report.left_out,
        'bytes': report.nbytes,
        'differences': report.differences,
        'verified': report.verified or None,
    }


def _merge(report: Converted) -> str:
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
    if report.verified:
        print(
            'verified: largest difference of {compared} logits {difference:.3e}, the largest of '
            'which is {largest:.3e}'.format(**report.verified)
        )


def _how_to_load(report: Converted, destination: pathlib.Path) -> str:
    if report.target == 'mhc':
        streams = report.streams
        flags = ['--residual-type mhc', f'--mhc-num-residual-streams {streams.num_streams}']
        flags.append(f'--mhc-sinkhorn-iterations {streams.iterations}')
        if streams.head is not None:
            flags.append('--mhc-stream-merge learned')
        if streams.norm_eps != NORM_EPS:
            flags.append(f'--mhc-norm-eps {streams.norm_eps:g}')
        return f'train on with --load {destination} {" ".join(flags)}'
    return f'a new optimizer starts from iteration 0: {destination} is a release'
