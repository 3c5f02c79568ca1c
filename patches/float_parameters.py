"""Patch: checkpoints of a 16-bit model in which some parameters are fp32. On any device.

Both mixed-precision optimizers train such a model, but address the state of a parameter by its
position and count wrongly as soon as one group holds both kinds. Their checkpoint then fails with a
shape mismatch or, between parameters of equal shape, pairs states with the wrong parameters.

* ``DistributedOptimizer`` numbers parameters in buffer order and then puts the fp32 ones first.
* ``Float16OptimizerWithFloat16Params`` numbers the 16-bit parameters only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_mhc.patches.engine import Patch, on_every_release


def _in_optimizer_order(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(cls, *args, **kwargs):
        _, groups = original(cls, *args, **kwargs)
        positions = {}
        for index, group in enumerate(groups):
            # Stable, so that each kind keeps its buffer order; nothing moves in a uniform group.
            group['params'].sort(key=lambda param: param.dtype != torch.float32)
            positions.update({p: (index, n) for n, p in enumerate(group['params'])})
        return positions, groups

    return build


@contextlib.contextmanager
def _counting_every_parameter(optimizer):
    """Let the two lists that number parameters hold the fp32 ones too, in the optimizer's order."""
    half, main = optimizer.float16_groups, optimizer.fp32_from_float16_groups
    model_param = {
        id(m): h for hs, ms in zip(half, main, strict=True) for h, m in zip(hs, ms, strict=True)
    }
    everything = [group['params'] for group in optimizer.optimizer.param_groups]
    optimizer.float16_groups = [[model_param.get(id(p), p) for p in ps] for ps in everything]
    optimizer.fp32_from_float16_groups = everything
    try:
        yield
    finally:
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = half, main


def _with_every_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self, *args, **kwargs):
        if self.is_stub_optimizer or not any(self.fp32_from_fp32_groups):
            return original(self, *args, **kwargs)
        with _counting_every_parameter(self):
            return original(self, *args, **kwargs)

    return call


_HALF = 'megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params'

FLOAT_PARAMETER_PATCHES: tuple[Patch, ...] = (
    Patch(
        id='float-parameters-distributed',
        target='megatron.core.optimizer.distrib_optimizer:'
        'DistributedOptimizer._build_optimizer_group_ranges',
        wrap=_in_optimizer_order,
        reason='fp32 parameters move to the front of their group after they have been numbered',
        fingerprints=on_every_release('8ab7e3df'),
    ),
    Patch(
        id='float-parameters-save',
        target=f'{_HALF}.sharded_state_dict',
        wrap=_with_every_parameter,
        reason='only 16-bit parameters are numbered',
        fingerprints=on_every_release('aaf75333'),
    ),
    Patch(
        id='float-parameters-load',
        target=f'{_HALF}.load_state_dict',
        wrap=_with_every_parameter,
        reason='main parameters are copied back by position',
        fingerprints=on_every_release('73b5d4a9'),
    ),
)
