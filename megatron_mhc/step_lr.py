"""Learning rate in steps: the mHC paper's schedule (arXiv 2512.24880, Table 5).

After the warm-up the rate stays at ``--lr`` and falls to given fractions of it at given fractions
of the decay: to 0.316 and 0.1 from 80 % and 90 % on. The paper says "rates"; read as factors of the
base rate, 10^-0.5 and 10^-1, they are DeepSeek's usual schedule.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
from collections.abc import Sequence

STYLE = 'step'
MILESTONES = (0.8, 0.9)
RATES = (0.316, 0.1)


def step_factor(fraction: float, milestones: Sequence[float], rates: Sequence[float]) -> float:
    """Factor of the base learning rate.

    Args:
        fraction: of the decay that has passed, 0 to 1; a milestone counts as passed when reached.
        milestones: ascending fractions.
        rates: the factor from each milestone on.
    """
    passed = bisect.bisect_right(milestones, fraction)
    return rates[passed - 1] if passed else 1.0


def add_step_lr_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the style to Megatron's own flag, and the group with its settings; return ``parser``."""
    for action in parser._actions:
        if '--lr-decay-style' in action.option_strings:
            action.choices = [*action.choices, STYLE]
    group = parser.add_argument_group(
        'learning rate in steps', f'What --lr-decay-style {STYLE} does (mHC, Table 5).'
    )
    group.add_argument(
        '--lr-step-milestones',
        type=float,
        nargs='+',
        metavar='FRACTION',
        help='fractions of the decay (--lr-decay-iters, else the whole training) from which the '
        f'next rate holds (default: {_shown(MILESTONES)})',
    )
    group.add_argument(
        '--lr-step-rates',
        type=float,
        nargs='+',
        metavar='FACTOR',
        help='factors of --lr from each milestone on; --min-lr stays the least learning rate '
        f'(default: {_shown(RATES)})',
    )
    return parser


def resolve_step_lr(args: argparse.Namespace) -> bool:
    """Whether the style is asked for; its settings are then checked and written to ``args``.

    Raises:
        ValueError: settings without the style, or that make no schedule.
    """
    settings = {'lr_step_milestones': MILESTONES, 'lr_step_rates': RATES}
    if args.lr_decay_style != STYLE:
        for name in settings:
            if getattr(args, name) is not None:
                raise ValueError(
                    f'{_flag(name)} has no effect with --lr-decay-style {args.lr_decay_style}: '
                    f'drop it or set --lr-decay-style {STYLE}'
                )
        return False
    for name, default in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, list(default))
    milestones, rates = args.lr_step_milestones, args.lr_step_rates
    if len(milestones) != len(rates):
        raise ValueError(
            f'--lr-step-milestones {_shown(milestones)} and --lr-step-rates {_shown(rates)}: '
            f'{len(milestones)} and {len(rates)} values; give one rate for each milestone'
        )
    if not all(a < b for a, b in itertools.pairwise((0.0, *milestones, 1.0))):
        raise ValueError(
            f'--lr-step-milestones {_shown(milestones)}: wanted ascending fractions between 0 and '
            '1, such as 0.8 0.9'
        )
    if not all(0 <= rate < float('inf') for rate in rates):
        raise ValueError(
            f'--lr-step-rates {_shown(rates)}: wanted finite factors of --lr, none below 0, '
            'such as 0.316 0.1'
        )
    return True


def _shown(values: Sequence[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')
