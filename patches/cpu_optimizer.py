"""Patch of the emulated CPU device: the distributed optimizer's checkpoint with torch's Adam.

Without Transformer Engine and Apex Megatron falls back to ``torch.optim.AdamW``, which keeps a
``step`` tensor per parameter and allocates its state in the first step. The distributed optimizer
can save that but not load it: it asserts on the empty state, looks for ``step`` among the sharded
tensors, copies into a leaf outside ``no_grad``, and hands one ``step`` tensor to all parameters,
which then advances once per parameter. None of this depends on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_mhc.patches.engine import Patch, on_every_release


def _is_torch_adam(optimizer) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def state_dict(self, *args, **kwargs):
        if _is_torch_adam(self.optimizer) and not self.optimizer.state:
            # What Adam itself would allocate in its first step.
            for group in self.optimizer.param_groups:
                for param in group['params']:
                    self.optimizer.state[param] = {
                        'step': torch.tensor(0.0),
                        'exp_avg': torch.zeros_like(param),
                        'exp_avg_sq': torch.zeros_like(param),
                    }
        return original(self, *args, **kwargs)

    return state_dict


def _load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state['step'] = state['step'].clone()

    return load_state_dict


def _set_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_states(self, model_param, *args, **kwargs):
        if not _is_torch_adam(self.optimizer):
            return original(self, model_param, *args, **kwargs)
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]['params'][order]]
        # The step comes from the parameter groups; the one among the tensors is a placeholder.
        step = state.pop('step', None)
        with torch.no_grad():
            original(self, model_param, *args, **kwargs)
        if step is not None:
            state['step'] = step

    return set_states


_OPTIMIZER = 'megatron.core.optimizer.distrib_optimizer:DistributedOptimizer'

CPU_OPTIMIZER_PATCHES: tuple[Patch, ...] = (
    Patch(
        id='cpu-optimizer-state',
        target=f'{_OPTIMIZER}.state_dict',
        wrap=_state_dict,
        reason='a resumed run asks for the step of an Adam that has not stepped yet',
        fingerprints=on_every_release('64b28ff1'),
    ),
    Patch(
        id='cpu-optimizer-load',
        target=f'{_OPTIMIZER}.load_state_dict',
        wrap=_load_state_dict,
        reason='loading leaves one step tensor shared by all parameters',
        fingerprints=on_every_release('73b5d4a9'),
    ),
    Patch(
        id='cpu-optimizer-set',
        target=f'{_OPTIMIZER}._set_main_param_and_optimizer_states',
        wrap=_set_states,
        reason='the per-parameter step is taken for a sharded tensor',
        fingerprints=on_every_release('cf243566'),
        reads=('model_param',),
    ),
)
