"""``megatron-mhc study``: which layout of ranks trains a model fastest, before any GPU is asked."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mhc.inputs.options import (
    CHUNKS,
    CP,
    EP,
    MICRO_BATCH,
    PP,
    SCHEDULE,
    SEGMENTS,
    STREAMS,
    TP,
    add_option,
)
from megatron_mhc.inputs.values import (
    MOST_LAYERS,
    MOST_RANKS,
    MOST_STREAMS,
    input_file,
    integer,
    number,
)
from megatron_mhc.recipes.names import MODELS
from megatron_mhc.settings.names import (
    MIRRORED_SCHEDULES,
    PIPELINE_SCHEDULES,
    RECOMPUTE_SEGMENTS,
    STUDIED_SCHEDULES,
)
from megatron_mhc.study.names import (
    FULL,
    HARDWARE,
    PRECISIONS,
    SCALING,
    STUDIED,
    STUDIED_WORDS,
    only_studied,
    token_count,
)

_COUNT, _STREAMS = integer(1, MOST_RANKS), integer(1, MOST_STREAMS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc study``."""
    parser.set_defaults(answer='megatron_mhc.study.answer')
    parser.description = (
        'Estimate step time, memory and messages of every layout of ranks. No GPU and no Megatron '
        'is needed, but for --model.'
    )
    add = parser.add_argument
    add('name', nargs='?', choices=MODELS, metavar='RECIPE', help=', '.join(MODELS))
    add('--calibrate', action='store_true', help='published figures beside ours, and the error')
    add('--json', action='store_true', help='print one JSON object')
    add('-o', '--output', type=Path, metavar='DIR', help='write CSV, flags and a picture there')
    add('--top', type=_COUNT, metavar='N', help='show N layouts at most (default: 12)')
    add(
        '--launch-scripts',
        type=Path,
        metavar='DIR',
        help='write the best layout for each number of GPUs there: for torchrun and for Slurm',
    )
    machine = parser.add_argument_group('machine').add_argument
    names = f'{", ".join(HARDWARE)} or FILE.yaml'
    machine('--hardware', metavar='NAME', help=f'{names} (default: h100)')
    machine(
        '--set', nargs='+', default=[], metavar='FIELD=VALUE', help='change fields of the hardware'
    )
    machine(
        '--kernel-times',
        type=input_file,
        metavar='CSV',
        help='results.csv of make bench (default: mHC kernels from the bytes that they move)',
    )
    ranks = parser.add_argument_group('what to combine; several values each').add_argument
    ranks('--gpus', type=_COUNT, nargs='+', metavar='N', help='ranks in all (default: 64)')
    add_option(
        ranks, TP, type=_COUNT, nargs='+', metavar='N', help='(default: powers of 2 in a node)'
    )
    add_option(ranks, CP, type=_COUNT, nargs='+', metavar='N', help='(default: 1)')
    add_option(ranks, PP, type=_COUNT, nargs='+', metavar='N', help='(default: powers of 2)')
    add_option(
        ranks,
        CHUNKS,
        type=_COUNT,
        nargs='+',
        metavar='N',
        help='chunks a rank, of interleaved (default: 2)',
    )
    add_option(
        ranks, EP, type=_COUNT, nargs='+', metavar='N', help='(default: divisors of the experts)'
    )
    ranks('--dp', type=_COUNT, nargs='+', metavar='N', help='keep only these (default: all)')
    known = {'choices': _KNOWN, 'metavar': 'NAME'}
    add_option(ranks, SCHEDULE, nargs='+', help=_SCHEDULES, **known)
    add_option(ranks, MICRO_BATCH, type=_COUNT, nargs='+', metavar='B', help='(default: 1)')
    add_option(ranks, STREAMS, type=_STREAMS, nargs='+', metavar='N', help='n (default: 4)')
    add_option(
        ranks,
        SEGMENTS,
        dest='segments',
        type=integer(1, 2 * MOST_LAYERS, words=(*RECOMPUTE_SEGMENTS, FULL)),
        nargs='+',
        metavar='L_R',
        help=f'{", ".join(RECOMPUTE_SEGMENTS)} or sublayers of a segment, or full, which runs '
        'whole layers again (default: auto)',
    )
    ranks(
        '--precision',
        nargs='+',
        choices=PRECISIONS,
        metavar='NAME',
        help='of linear layers: bf16 or fp8, a model (default: bf16)',
    )
    budget = parser.add_argument_group('scaling and cost').add_argument
    budget(
        '--scaling',
        nargs='+',
        choices=SCALING,
        metavar='KIND',
        help='curves over several --gpus: strong (the same batch) or weak (a batch that grows '
        'with the GPUs); launch scripts are of the first (default: strong weak)',
    )
    budget(
        '--train-tokens',
        type=token_count,
        metavar='N',
        help="of the whole training, such as 2e11, 300B or 1T (default: the recipe's)",
    )
    budget(
        '--gpu-hour-price',
        type=number(0, above=True, remedy='give a price such as 2.5'),
        metavar='PRICE',
        help='of one GPU for an hour, in any currency',
    )
    model = parser.add_argument_group('model').add_argument
    model(
        '--model',
        nargs=argparse.REMAINDER,
        metavar='FLAGS',
        help='last: a model of your own as Megatron flags, instead of RECIPE; needs Megatron',
    )
    model('--residual-type', type=_residual, metavar='TYPE', help=_TYPES)
    model('--global-batch-size', type=_COUNT, metavar='N', help="(default: the recipe's)")


_TYPES = f'{STUDIED_WORDS} (default: mhc)'
# Not modelled: memory and gradients of two copies.
_KNOWN = tuple(name for name in PIPELINE_SCHEDULES if name not in MIRRORED_SCHEDULES)
_SCHEDULES = f'{", ".join(_KNOWN)} (default: {" ".join(STUDIED_SCHEDULES)})'


def _residual(text: str) -> str:
    if text not in STUDIED:
        raise argparse.ArgumentTypeError(f'{text}: {only_studied(text)}')
    return text
