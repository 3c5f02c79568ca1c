"""Patch: the call that saves a checkpoint, to say which layouts will be able to read it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_mhc.patches.engine import Patch
from megatron_mhc.settings.flags_pipeline import advise_on_optimizer_state
from megatron_mhc.settings.flags_residual import parsed_arguments


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(*args, **kwargs):
        result = original(*args, **kwargs)
        advise_on_optimizer_state(parsed_arguments(), 'saved')
        return result

    return save_checkpoint


SAVE_CHECKPOINT_PATCH = Patch(
    id='save-checkpoint',
    target='megatron.training.training:save_checkpoint',
    wrap=_wrap,
    reason='whether optimizer state can be moved to another layout is decided when it is saved',
    fingerprints={'0.17': '9bf8f7dd', '0.18': '9bf8f7dd', '0.19': '91d2680e'},
)
