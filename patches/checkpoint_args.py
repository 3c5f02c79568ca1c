"""Seam: the comparison of a loaded checkpoint's arguments with the run's.

The parser's hook has already compared distributed checkpoints; this covers the formats whose
arguments are only read while loading.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_mhc.arguments import residual_config_from_args
from megatron_mhc.checkpoint import check_checkpoint
from megatron_mhc.patches.engine import Patch


def _wrap(original: Callable) -> Callable:
    def check_checkpoint_args(checkpoint_args, *args, **kwargs):
        from megatron.training import get_args

        run = get_args()
        check_checkpoint(checkpoint_args, residual_config_from_args(run), run.load)
        return original(checkpoint_args, *args, **kwargs)

    return check_checkpoint_args


CHECKPOINT_ARGS_PATCH = Patch(
    id='checkpoint-args',
    target='megatron.training.checkpointing:check_checkpoint_args',
    wrap=_wrap,
    reason='called for every checkpoint format before its weights are used',
    fingerprints={'0.17': '43e8475a', '0.18': '43e8475a', '0.19': '7b6678b6'},
)
