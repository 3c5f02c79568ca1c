"""``megatron-mhc recipe``: the paper's models, their parameters, memory, messages and FLOPs."""

from __future__ import annotations

import argparse

from megatron_mhc.inputs.options import CP, EP, MICRO_BATCH, PP, TP, add_option
from megatron_mhc.inputs.values import MOST_RANKS, flag_of, integer
from megatron_mhc.recipes.names import LAYOUT_NAMES, MODELS, SIZES
from megatron_mhc.settings.names import MAPPED_TYPES

_WORDS = {'tp': TP, 'cp': CP, 'pp': PP, 'ep': EP, 'micro_batch': MICRO_BATCH}
_SIZES = {
    'gpus': 'ranks in all',
    'tp': 'tensor-parallel ranks',
    'cp': 'context-parallel ranks',
    'pp': 'pipeline ranks',
    'ep': 'expert-parallel ranks',
    'dp': 'data-parallel ranks',
    'micro_batch': 'sequences of a microbatch',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The topics of ``megatron-mhc recipe``."""
    parser.set_defaults(answer='megatron_mhc.recipes.answer')
    topics = parser.add_subparsers(dest='topic', required=True)
    listing = topics.add_parser('list', help='the models and their layouts')
    show = topics.add_parser(
        'show',
        help='parameters, memory of a rank, bytes between stages, FLOPs',
        description='Size up a recipe. No GPU and no Megatron is needed, but for --build.',
    )
    for parser in (listing, show):
        parser.add_argument('--json', action='store_true', help='print one JSON object')
    show.add_argument('name', choices=MODELS, metavar='NAME', help=', '.join(MODELS))
    show.add_argument(
        '--residual-type',
        choices=('standard', *MAPPED_TYPES),
        default='mhc',
        help='(default: mhc)',
    )
    show.add_argument(
        '--mhc-manifold', metavar='NAME', help='what H_res is kept on (default: sinkhorn)'
    )
    show.add_argument(
        '--build',
        action='store_true',
        help='also build the model with Megatron, on the meta device, and count its parameters',
    )
    ranks = show.add_argument_group('layout: one by name, or changed')
    ranks.add_argument(
        '--layout', choices=LAYOUT_NAMES, help='(default: 8gpu; 64gpu with more than 64 --gpus)'
    )
    for name in SIZES:
        words = _WORDS.get(name, (flag_of(name),))
        count = {'type': integer(1, MOST_RANKS), 'metavar': 'N'}
        add_option(ranks.add_argument, words, dest=name, help=_SIZES[name], **count)
