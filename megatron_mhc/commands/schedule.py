"""``megatron-mhc schedule``: list, draw, prove, time and compare pipeline schedules."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mhc.inputs.options import CHUNKS, PP, REBUILDING, SCHEDULE, WithDefaults, add_option
from megatron_mhc.inputs.values import input_file, integer, number
from megatron_mhc.schedules.names import RECOMPUTE_STREAMS, SCHEDULE_NAMES
from megatron_mhc.trace import command as schedule_trace

# The first two are plan files, the others pictures of its timeline.
FORMATS = ('text', 'csv', 'drawing', 'svg', 'png', 'trace')
# Flag -> default, that of ``Times``, and meaning.
TIMES = {
    'forward': (1.0, 'F, the forward of a microbatch through all stages of a rank'),
    'input-grad': (1.0, 'I, the gradient of the activations'),
    'weight-grad': (1.0, 'W, the gradient of the weights'),
    'recompute': (0.0, 'R, what is dropped and rebuilt; inside the backward unless --lowered'),
    'hop': (0.0, 'from one rank to another'),
    'reduce': (0.0, 'gradient reduction of a rank'),
}
_HELP = {
    'list': 'the schedules and what they need',
    'show': 'draw a schedule, or write its operations',
    'validate': 'prove that a schedule or a plan file is complete and cannot hang',
    'simulate': 'total time, bubble and microbatches in flight of a schedule',
    'compare': 'a table of all schedules for these ranks and microbatches',
}
_FORMAT = 'of the output; text and csv are what --plan reads, the others pictures'
_BOUND = 'most microbatches in flight on a rank, of v-bound (default: those of v-half)'
_FROM = 'begin the picture at this time, in the unit of the times'
_WIDTH = (
    'columns of a drawing (default: the terminal), pixels of a PNG (default: 2400) or of an SVG '
    '(default: all of it); 0 for all of it, as far as it fits in a file'
)
_COUNT, _TIME, _FACTOR = integer(1), number(0, 1e15), number(0, above=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The topics of ``megatron-mhc schedule``."""
    topics = parser.add_subparsers(dest='topic', required=True)
    parser.set_defaults(answer='megatron_mhc.commands.schedule_answer')
    for topic, words in _HELP.items():
        parser = topics.add_parser(
            topic,
            help=words,
            description=words[0].upper() + words[1:] + '.',
            formatter_class=WithDefaults,
        )
        parser.add_argument('--json', action='store_true', help='print one JSON object')
        if topic == 'list':
            continue
        which = parser.add_argument_group('which plan')
        if topic != 'compare':
            known = {'choices': SCHEDULE_NAMES, 'metavar': 'NAME'}
            add_option(which.add_argument, SCHEDULE, help='see list', **known)
            which.add_argument(
                '--plan', type=input_file, metavar='FILE', help='operations, text or CSV'
            )
        add_option(which.add_argument, PP, type=_COUNT, metavar='P', help='pipeline ranks')
        which.add_argument('--microbatches', type=_COUNT, metavar='M', help='of one step')
        held = {'dest': 'chunks', 'type': _COUNT, 'default': 2, 'metavar': 'N'}
        add_option(which.add_argument, CHUNKS, help='stages a rank, of interleaved', **held)
        if topic != 'compare':
            which.add_argument('--live-bound', type=_FACTOR, metavar='N', help=_BOUND)
        if topic != 'validate':
            which.add_argument(
                '--lowered', action='store_true', help='with communication, as it is executed'
            )
            _add_times(parser)
        if topic == 'show':
            parser.add_argument('--format', choices=FORMATS, default='drawing', help=_FORMAT)
            parser.add_argument(
                '-o', '--output', type=Path, metavar='FILE', help='instead of stdout'
            )
            _add_extent(parser)
    schedule_trace.add_parser(topics)


def _add_extent(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('how much of it; what is too wide loses its middle')
    group.add_argument('--from', dest='start', type=_TIME, metavar='T', help=_FROM)
    group.add_argument('--to', dest='end', type=_TIME, metavar='T', help='end there')
    group.add_argument('--width', type=integer(0), metavar='N', help=_WIDTH)


def _add_times(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('times, in any unit, of one microbatch on a whole rank')
    add = group.add_argument
    for name, (default, words) in TIMES.items():
        names = REBUILDING if name == 'recompute' else (f'--{name}',)
        settings = {'dest': name.replace('-', '_'), 'type': _TIME, 'metavar': 'T', 'help': words}
        add_option(add, names, default=default, **settings)
    add('--fused-slot-factor', type=_FACTOR, metavar='A', default=1.0, help='of F + B')
    add('--stage-scale', type=_FACTOR, nargs='+', metavar='X', help='a factor for each stage')
    add('--recompute-stream', choices=RECOMPUTE_STREAMS, default='compute', help='of R')
    add('--link-contention', action='store_true', help='one tensor at a time from rank to rank')
