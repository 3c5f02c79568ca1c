"""``--lr-decay-style step``: its settings, and the style that holds them, from a namespace."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise

from megatron_mhc.inputs.values import MOST_FACTOR
from megatron_mhc.settings.flag import check, flags_of, given, refuse_in_vain, setting, write_back
from megatron_mhc.settings.megatron_sizes import STYLE

_STEP = {'lr_decay_style': (STYLE,)}


@dataclass(frozen=True)
class LrSteps:
    """The learning rate after warm-up: the base rate, then a multiple of it from each milestone on.

    Raises:
        ValueError: a value is out of range or order, or has none beside it; the message names the
            flag.
    """

    milestones: tuple[float, ...] = setting(
        (0.8, 0.9),
        '--lr-step-milestones',
        float,
        many=True,
        above=True,
        most=1.0,
        only=_STEP,
        metavar='M',
        source='mHC, Table 5',
        why='they are parts of training',
        help='fractions of `--lr-decay-iters` or `--lr-decay-samples`, by default all of training, '
        'ascending and below 1',
    )
    # 10^-0.5 and 10^-1.
    rates: tuple[float, ...] = setting(
        (0.316, 0.1),
        '--lr-step-rates',
        float,
        many=True,
        most=MOST_FACTOR,
        only=_STEP,
        metavar='R',
        source='mHC, Table 5',
        why='they multiply the base learning rate',
        help='multiples of `--lr` from each milestone on',
    )

    def __post_init__(self) -> None:
        check(self)
        flag = flags_of(LrSteps)['milestones']
        shown = f'{flag.name} {" ".join(map(str, self.milestones))}'
        if len(self.milestones) != len(self.rates):
            raise ValueError(
                f'{shown}: {len(self.milestones)} milestones for {len(self.rates)} rates; give '
                '--lr-step-rates one rate for each milestone'
            )
        if any(a >= b for a, b in pairwise((*self.milestones, 1))):
            raise ValueError(
                f'{shown}: wanted in ascending order, each once and below 1; {flag.remedy}'
            )

    @property
    def style(self) -> str:
        """The decay style that holds the schedule, e.g. ``step 0.8:0.316 0.9:0.1``."""
        steps = zip(self.milestones, self.rates, strict=True)
        return ' '.join([STYLE, *(f'{milestone}:{rate}' for milestone, rate in steps)])


def offer_steps(parser: argparse.ArgumentParser) -> None:
    """Add ``step`` to the choices of Megatron's ``--lr-decay-style``."""
    for action in parser._actions:
        if action.dest == 'lr_decay_style' and action.choices:
            action.choices = [*action.choices, STYLE]


def resolve_lr_steps(args: argparse.Namespace) -> None:
    """Write the complete decay style to ``args``.

    Raises:
        ValueError: a flag is out of range, or has no effect with the decay style.
    """
    style = getattr(args, 'lr_decay_style', None)
    values = given(args, LrSteps)
    flags = [flags_of(LrSteps)[name] for name in values]
    refuse_in_vain(flags, 'lr_decay_style', '--lr-decay-style', str(style))
    if style == STYLE:
        steps = LrSteps(**values)
        write_back(args, steps)
        args.lr_decay_style = steps.style
