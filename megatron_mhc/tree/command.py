"""``megatron-mhc patch``: put our seams into a user's own Megatron tree, or take them out again."""

from __future__ import annotations

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc patch``."""
    parser.set_defaults(answer='megatron_mhc.tree.answer')
    parser.add_argument(
        'tree', metavar='TREE', type=pathlib.Path, help='the folder that holds megatron/'
    )
    modes = parser.add_mutually_exclusive_group()
    parser.set_defaults(mode='check')
    for mode, text in (
        ('check', 'print where every seam belongs and whether it fits (default)'),
        ('diff', 'print the change that --apply would make, for git apply'),
        ('apply', 'put the seams in, in all files or none; commits nothing'),
        ('reverse', 'take out exactly the lines that --apply put in'),
    ):
        modes.add_argument(f'--{mode}', dest='mode', action='store_const', const=mode, help=text)
    parser.add_argument(
        '--untested',
        action='store_true',
        help='go on with a megatron-core that was never tested or a signature that no release has; '
        'seams whose place is not found are left out',
    )
    parser.add_argument(
        '--allow-dirty',
        action='store_true',
        help='change files whose own changes are not committed, too',
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')
