"""``megatron-mhc report``: whether runs are healthy, and their curves and maps on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

_DESCRIPTION = (
    'Say of each run whether it is healthy, and what is wrong, in which layer and since when; draw '
    "loss, gains, streams, logits and maps. Reads TensorBoard's events; no GPU is needed."
)
_FOLDERS = (
    'folder of --tensorboard-dir, or one that holds it, or folders seed-N of several runs, which '
    'become one curve with a band; the losses of the others are compared with those of the first'
)
_STATUS = 'Exit status: 0, whatever the verdicts; 2 where something cannot be read or written.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc report``."""
    parser.set_defaults(answer='megatron_mhc.monitor.answer')
    parser.description = _DESCRIPTION
    parser.epilog = _STATUS
    parser.add_argument('folders', nargs='+', metavar='[NAME=]LOGDIR', help=_FOLDERS)
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        default=Path('mhc-report.html'),
        metavar='FILE',
        help='page to write: .html, all in one file, with the numbers; or a .png, .svg or .pdf '
        'picture (default: mhc-report.html)',
    )
    parser.add_argument(
        '--sublayers',
        nargs='+',
        type=int,
        metavar='L',
        help='sublayers of the maps, from 0, two a layer (default: first, middle, last and '
        'any in trouble)',
    )
    parser.add_argument(
        '--json', action='store_true', help='print the verdicts, with their figures, as one object'
    )
