"""``megatron-mhc recompute``: memory of recompute in segments, measured beside the paper's formula.

Builds layers of a GPT with mHC, runs them forward and backward once and counts every byte that
torch allocates. Unit of the table: C values a token. "mHC" is what hyper-connections make, with
the streams that the layers start from; "all" adds what attention and MLP keep and, in the
backward, gradients.
"""

from __future__ import annotations

import argparse

from megatron_mhc.inputs.options import (
    FULL,
    KERNEL_BACKEND,
    SEGMENTS,
    STREAMS,
    SUBLAYERS,
    add_option,
)
from megatron_mhc.inputs.values import MOST_LAYERS, MOST_STREAMS, integer
from megatron_mhc.settings.names import RECOMPUTE_SEGMENTS

HEADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc recompute``."""
    parser.set_defaults(answer='megatron_mhc.commands.recompute_answer')
    parser.description = __doc__.partition('\n\n')[2]
    add = parser.add_argument
    add_option(
        add,
        SUBLAYERS,
        dest='sublayers',
        type=_even,
        nargs='+',
        default=[24, 36, 60],
        metavar='L',
        help='even numbers (default: 24 36 60)',
    )
    add_option(
        add,
        SEGMENTS,
        dest='segments',
        nargs='+',
        type=integer(1, 2 * MOST_LAYERS, 'default: none auto stage', words=RECOMPUTE_SEGMENTS),
        default=['none', 'auto', 'stage'],
        metavar='B',
        help='values of --mhc-recompute-layer-num (default: none auto stage)',
    )
    streams = integer(1, MOST_STREAMS)
    known = {'dest': 'num_streams', 'type': streams, 'metavar': 'N'}
    add_option(add, STREAMS, default=4, help='n (default: 4)', **known)
    add('--hidden-size', type=integer(HEADS, 2**16), default=256, help='C (default: 256)')
    add('--tokens', type=integer(1, 2**20), default=8, help='T (default: 8)')
    backends = ('torch', 'triton')
    add_option(add, KERNEL_BACKEND, choices=backends, default='torch', help='default: torch')
    add_option(
        add,
        FULL,
        dest='full',
        type=integer(0, MOST_LAYERS),
        default=0,
        metavar='K',
        help='under full recomputation, --recompute-method uniform (default: 0, without)',
    )
    add('--json', action='store_true', help='print one JSON object')


def _even(text: str) -> int:
    value = integer(2, 2 * MOST_LAYERS, 'a layer has two, attention and MLP; use even numbers')(
        text
    )
    if value % 2:
        raise argparse.ArgumentTypeError(
            f'{text}: a layer has two sublayers, attention and MLP; use even numbers'
        )
    return value
