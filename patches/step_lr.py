"""Seam: the learning rate that Megatron's scheduler gives a parameter group.

Warm-up, steps, weight decay, checkpoints and logging stay the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_mhc.arguments import parsed_arguments
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.step_lr import STYLE, step_factor


def _wrap(original: Callable) -> Callable:
    def get_lr(self, param_group, *args, **kwargs):
        warming = self.num_steps <= self.lr_warmup_steps and self.lr_warmup_steps > 0
        if self.lr_decay_style != STYLE or warming:
            return original(self, param_group, *args, **kwargs)
        settings = parsed_arguments()
        factor = step_factor(
            self.num_steps / self.lr_decay_steps,
            settings.lr_step_milestones,
            settings.lr_step_rates,
        )
        highest = param_group.get('max_lr', self.max_lr)
        return max(highest * factor, param_group.get('min_lr', self.min_lr))

    return get_lr


STEP_LR_PATCH = Patch(
    id='step-lr',
    target='megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr',
    wrap=_wrap,
    reason='decay styles are branches of one function; a wrapper adds one',
    fingerprints=on_every_release('45201938'),
)
