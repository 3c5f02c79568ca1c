"""Patches: the communication of a mixture of experts, under the other microbatch of a fused slot.

Dispatch and combine run on a stream of their own and hand over to the other microbatch once they
are launched, in the backward too. The residual around them is whatever the layer makes of it. In
the forward of a microbatch whose backward may be in a fused slot they run there as well, because
autograd replays an operation on the stream of its forward.

Ranks of one expert-parallel group run the same plan, and microbatches change at these places only,
so that all issue their collectives in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.schedules.executor_lanes import in_lanes, yield_lane, yield_point
from megatron_mhc.schedules.executor_streams import launch, side_stream
from megatron_mhc.settings.model_config import ENGRAM, PIPELINE, RESIDUAL
from megatron_mhc.settings.names import FUSED_SCHEDULES

_MOVED: ContextVar[bool] = ContextVar('megatron_mhc_moe_moved', default=False)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def communicate(self, hidden_states, *args, **kwargs):
        if not (in_lanes() or _backward_may_be_in_lanes(self.config)):
            return original(self, hidden_states, *args, **kwargs)

        def run(hidden_states, args, held):
            del held
            token = _MOVED.set(True)
            try:
                result = original(self, yield_point(hidden_states), *args, **kwargs)
            finally:
                _MOVED.reset(token)
            return result, _held(self)

        launched = launch(side_stream('moe'), run, hidden_states, args, _held(self))
        yield_lane()
        return launched.result()[0]

    return communicate


def _backward_may_be_in_lanes(config: Any) -> bool:
    """Whether microbatches of this model meet in fused slots, at the latest in their backward."""
    pipeline = PIPELINE.peek(config)
    fused = pipeline is not None and pipeline.schedule in FUSED_SCHEDULES
    return (fused or combines(config)) and torch.is_grad_enabled()


def combines(config: Any) -> bool:
    """Whether stock schedules are to combine passes of layers that are not Megatron's own."""
    residual = RESIDUAL.peek(config)
    asked = getattr(config, 'overlap_moe_expert_parallel_comm', False)
    own = ENGRAM.peek(config) is not None or (residual is not None and residual.enabled)
    return own and bool(asked)


def _with_memory_of_its_own(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather_from_sequence_parallel_region(*args, **kwargs):
        if _MOVED.get():
            kwargs.pop('use_global_buffer', None)
        return original(*args, **kwargs)

    return gather_from_sequence_parallel_region


def _held(dispatcher: Any) -> list[Tensor]:
    """Tensors that a dispatcher passes on from one of its methods to the next by itself."""
    owners = (dispatcher, getattr(dispatcher, '_comm_manager', None))
    values = [value for owner in owners if owner is not None for value in vars(owner).values()]
    return [value for value in values if isinstance(value, Tensor) and value.is_cuda]


_patch = functools.partial(
    Patch, wrap=_wrap, reason='all communication of the experts passes through it'
)
_MODULE = 'megatron.core.transformer.moe.token_dispatcher'

MOE_LANE_PATCHES = tuple(
    _patch(
        id=f'moe-{kind.lower()}-{method}',
        target=f'{_MODULE}:MoE{kind}TokenDispatcher.token_{method}',
        fingerprints=on_every_release(digest),
    )
    for kind, method, digest in (
        ('AlltoAll', 'dispatch', '91e1c8b3'),
        ('AlltoAll', 'combine', 'd4b84dae'),
        ('AllGather', 'dispatch', '74fa1a24'),
        ('AllGather', 'combine', '6d885838'),
        ('Flex', 'dispatch', '4caab42d'),
        ('Flex', 'combine', 'd4b84dae'),
    )
) + (
    Patch(
        id='moe-gather-buffer',
        target=f'{_MODULE}:gather_from_sequence_parallel_region',
        wrap=_with_memory_of_its_own,
        reason='the all-gather dispatcher writes to one buffer that all microbatches share',
        fingerprints=on_every_release('cf32f7a7'),
        reads=('use_global_buffer',),
    ),
)
