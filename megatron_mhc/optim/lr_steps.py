"""The learning rate of ``--lr-decay-style step``, and the style that a checkpoint brings.

Milestones and rates are part of the decay style, e.g. ``step 0.8:0.316 0.9:0.1``. Megatron prints
that string, saves it with the scheduler, and compares or overrides it when a run resumes, so that
the schedule needs no state of its own.
"""

from __future__ import annotations

import argparse

from megatron_mhc.checkpoints.check import checkpoint_arguments, loads_optimizer
from megatron_mhc.settings.megatron_sizes import STYLE


def takes_steps(args: argparse.Namespace) -> bool:
    """Whether the scheduler needs to know steps; writes the style of a checkpoint to ``args``."""
    # Megatron loads the scheduler of the checkpoint, whatever the flags say.
    if args.use_checkpoint_opt_param_scheduler and args.load and loads_optimizer(args):
        saved = checkpoint_arguments(args.load, args.ckpt_step)
        if saved is not None and is_step_style(getattr(saved, 'lr_decay_style', '')):
            args.lr_decay_style = saved.lr_decay_style
    return is_step_style(args.lr_decay_style)


def is_step_style(style: str) -> bool:
    """Whether ``style`` is one of ``LrSteps``."""
    return style.startswith(STYLE + ' ')


def rate_at(style: str, done: float) -> float:
    """The multiple of the base learning rate after the fraction ``done`` of the decay steps."""
    rate = 1.0
    for step in style.split()[1:]:
        milestone, _, following = step.partition(':')
        if done >= float(milestone):
            rate = float(following)
    return rate
