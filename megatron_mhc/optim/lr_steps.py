"""``--lr-decay-style step``: the learning rate falls in steps, as in mHC Table 5.

Milestones and rates become part of the decay style, e.g. ``step 0.8:0.316 0.9:0.1``. Megatron
prints that string, saves it with the scheduler, and compares or overrides it when a run resumes, so
that the schedule needs no state of its own.
"""

from __future__ import annotations

import argparse

from megatron_mhc.inputs.values import MOST_FACTOR, number
from megatron_mhc.settings.megatron_sizes import STYLE

# mHC, Table 5: multiples of the base rate, 10^-0.5 and 10^-1.
PAPER_MILESTONES = (0.8, 0.9)
PAPER_RATES = (0.316, 0.1)


def add_lr_step_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``step`` to the choices of ``--lr-decay-style``, and its flags to ``parser``."""
    for action in parser._actions:
        if action.dest == 'lr_decay_style' and action.choices:
            action.choices = [*action.choices, STYLE]
    group = parser.add_argument_group(
        'learning rate steps',
        f'--lr-decay-style {STYLE}: warm-up, the base rate, then a multiple of it from each '
        'milestone on, never below --min-lr. With every residual type.',
    )
    group.add_argument(
        '--lr-step-milestones',
        type=number(),
        nargs='+',
        metavar='M',
        help='fractions of --lr-decay-iters or --lr-decay-samples, by default all of training, '
        'ascending between 0 and 1 (default: 0.8 0.9, mHC Table 5)',
    )
    group.add_argument(
        '--lr-step-rates',
        type=number(),
        nargs='+',
        metavar='R',
        help='multiples >= 0 of the base learning rate from each milestone on (default: 0.316 0.1, '
        'mHC Table 5)',
    )
    return parser


def resolve_lr_steps(args: argparse.Namespace) -> bool:
    """Write the complete decay style to ``args``; whether the scheduler needs to know steps.

    Raises:
        ValueError: a flag is out of range, or has no effect with the decay style.
    """
    if getattr(args, 'lr_decay_style', None) == STYLE:
        milestones = args.lr_step_milestones or list(PAPER_MILESTONES)
        rates = args.lr_step_rates or list(PAPER_RATES)
        check_steps(milestones, rates)
        args.lr_step_milestones, args.lr_step_rates = milestones, rates
        args.lr_decay_style = style_of(milestones, rates)
    else:
        for name in ('lr_step_milestones', 'lr_step_rates'):
            if getattr(args, name) is not None:
                raise ValueError(
                    f'--{name.replace("_", "-")} has no effect with --lr-decay-style '
                    f'{args.lr_decay_style}: drop it or set --lr-decay-style {STYLE}'
                )
    # Torch reads checkpoints, and help does without it.
    from megatron_mhc.checkpoints.check import checkpoint_arguments, loads_optimizer

    # Megatron loads the scheduler of the checkpoint, whatever the flags say.
    if args.use_checkpoint_opt_param_scheduler and args.load and loads_optimizer(args):
        saved = checkpoint_arguments(args.load, args.ckpt_step)
        if saved is not None and is_step_style(getattr(saved, 'lr_decay_style', '')):
            args.lr_decay_style = saved.lr_decay_style
    return is_step_style(args.lr_decay_style)


def check_steps(milestones: list[float], rates: list[float]) -> None:
    """Raise ValueError unless every milestone is a fraction, in order, with a rate >= 0."""
    shown = '--lr-step-milestones ' + ' '.join(map(str, milestones))
    if len(milestones) != len(rates):
        raise ValueError(
            f'{shown}: {len(milestones)} milestones for {len(rates)} rates; give '
            '--lr-step-rates one rate for each milestone'
        )
    if not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(
            f'{shown}: wanted fractions of training, each above 0 and below 1; the paper uses '
            '0.8 0.9'
        )
    if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
        raise ValueError(f'{shown}: wanted in ascending order, each once; the paper uses 0.8 0.9')
    if not all(0 <= rate <= MOST_FACTOR for rate in rates):
        raise ValueError(
            f'--lr-step-rates {" ".join(map(str, rates))}: wanted multiples of the '
            f'base learning rate from 0 to {MOST_FACTOR:g}; the paper uses 0.316 0.1'
        )


def style_of(milestones: list[float], rates: list[float]) -> str:
    """The decay style that holds a schedule; ``rate_at`` reads it."""
    return ' '.join(
        [STYLE, *(f'{milestone}:{rate}' for milestone, rate in zip(milestones, rates, strict=True))]
    )


def is_step_style(style: str) -> bool:
    """Whether ``style`` was made by ``style_of``."""
    return style.startswith(STYLE + ' ')


def rate_at(style: str, done: float) -> float:
    """The multiple of the base learning rate after the fraction ``done`` of the decay steps."""
    rate = 1.0
    for step in style.split()[1:]:
        milestone, _, following = step.partition(':')
        if done >= float(milestone):
            rate = float(following)
    return rate
