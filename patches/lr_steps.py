"""Patch: the learning rate of a parameter group, for ``--lr-decay-style step`` only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.optim.lr_steps import is_step_style, rate_at
from megatron_mhc.patches.engine import Patch, on_every_release


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_lr(self, param_group, *args, **kwargs):
        warming_up = 0 < self.lr_warmup_steps >= self.num_steps
        if warming_up or not is_step_style(self.lr_decay_style):
            return original(self, param_group, *args, **kwargs)
        # One division: 0.8 of 30000 is then reached at 24000, with no rounding of its own.
        rate = rate_at(self.lr_decay_style, self.num_steps / self.lr_decay_steps)
        max_lr = param_group.get('max_lr', self.max_lr)
        return max(param_group.get('min_lr', self.min_lr), rate * max_lr)

    return get_lr


LR_STEPS_PATCH = Patch(
    id='lr-steps',
    target='megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr',
    wrap=_wrap,
    reason='the one place where a decay style becomes a learning rate, per parameter group',
    fingerprints=on_every_release('45201938'),
    reads=('param_group',),
)
