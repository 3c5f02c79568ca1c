"""``megatron-mhc convert``: give a checkpoint streams, or another layout of those it has."""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
import time

from megatron_mhc.convert.choices import (
    FLAGS,
    HF,
    MEGATRON,
    MODEL_CLASSES,
    NUMERICS,
    RESIDUALS,
    STANDARD,
    TARGETS,
)
from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.options import STEP, STREAMS, add_option
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.values import MOST_TOKENS, integer, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_mhc.convert.told import Told

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
        choices=(targets := (*TARGETS, *RESIDUALS, *MODEL_CLASSES, HF, MEGATRON)),
        metavar='LAYOUT',
        help=f'layout of the output: {", ".join(targets)}; mhc is ours, gated and attention '
        'are residuals for a standard model, hybrid and gpt are the '
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
        '--mhc-numerics',
        choices=NUMERICS,
        metavar='NAME',
        help='mhc: how the output computes, paper or (default) as the layout of SRC, exactly',
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
    group = parser.add_argument_group('other residuals for a standard model')
    group.add_argument(
        '--gated-residual-rank', type=integer(), metavar='R', help='gated: rank of the gates (320)'
    )
    group.add_argument(
        '--attention-residual-block-size',
        type=integer(),
        metavar='N',
        help='attention: sublayers of a block (24)',
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
    if options.no_optim and options.to not in MODEL_CLASSES:
        refuse(COMMAND, f'--no-optim: --to {options.to} leaves it out always; drop the flag')
    answer = _way(options.to)
    started = time.monotonic()
    try:
        told = answer(options, given, lambda nbytes: progress(nbytes, 'written', 'B'))
    except (ValueError, OSError) as error:
        refuse(COMMAND, str(error))
    seconds = time.monotonic() - started
    if options.json:
        print(as_json(told.plain | {'seconds': round(seconds, 1)}))
        return 0
    told.tell()
    if options.dry_run:
        print('dry run: nothing was written')
    else:
        print(f'wrote {options.destination} in {seconds:.1f} s\n{told.then}')
    return 0


def _way(to: str) -> Callable[..., Told]:
    """What converts ``to`` that, and is told."""
    if to in MODEL_CLASSES:
        from megatron_mhc.convert.report import answer
    elif to in RESIDUALS:
        from megatron_mhc.convert.other_residual import answer
    elif to in (HF, MEGATRON):
        from megatron_mhc.convert.hf.answer import answer
    else:
        from megatron_mhc.convert.layout_report import answer
    return answer
