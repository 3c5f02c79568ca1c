"""Patch: ``num_floating_point_operations``, from which Megatron's TFLOP/s line is made.

Megatron counts what the stock model does; hyper-connections and the conditional memory add their
own share, so that the line does not call such a model slower than it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_mhc.engram.sizes import engram_flops
from megatron_mhc.patches.engine import Patch
from megatron_mhc.settings.flags_engram import engram_config_from_args
from megatron_mhc.settings.flags_residual import residual_config_from_args
from megatron_mhc.settings.hybrid_stages import main_pattern
from megatron_mhc.sizing.flops import STEP, residual_flops


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def num_floating_point_operations(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        settings = given['args']
        # Packed sequences: Megatron then counts tokens without padding. 0.17 does not.
        tokens = given.get('total_real_tokens_in_batch')
        if tokens is None:
            tokens = given['batch_size'] * settings.seq_length
        # Prediction layers (MTP) keep the stock residual.
        residual = residual_config_from_args(settings)
        main = main_pattern(lambda name: getattr(settings, name, None))
        pattern = None if main is None else main.replace('|', '')
        sublayers = 2 * settings.num_layers if pattern is None else len(pattern)
        own = residual_flops(residual, settings.hidden_size, sublayers, pattern)
        engram = engram_config_from_args(settings)
        own += engram_flops(engram, settings.hidden_size, residual.streams)
        return original(*args, **kwargs) + STEP * tokens * own

    return num_floating_point_operations


FLOPS_PATCH = Patch(
    id='flops',
    target='megatron.training.training:num_floating_point_operations',
    wrap=_wrap,
    reason='the TFLOP/s line and the count in checkpoints both come from it',
    fingerprints={'0.17': 'c05fa411', '0.18': 'd85173af', '0.19': 'd85173af', '0.20': 'd85173af'},
    reads=('args', 'batch_size'),
)
