"""Patches of a schedule run from a plan: its entry, and the split of the backward."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.utils import get_model_config

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.pipeline.deferred_wgrad import mark_delayed_parameters, split_linear
from megatron_mhc.pipeline.step import run_pipeline_step
from megatron_mhc.settings.model_config import PIPELINE


def _run_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_backward_pipelining(*, model, **kwargs):
        chunks = model if isinstance(model, list) else [model]
        pipeline = PIPELINE.peek(get_model_config(chunks[0]))
        if pipeline is None:
            return original(model=model, **kwargs)
        return run_pipeline_step(pipeline, model=chunks, **kwargs)

    return forward_backward_pipelining


def _split_weight_gradient(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(split_linear, original)


def _with_delayed_hooks(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        config, settings = bound.arguments['config'], bound.arguments['ddp_config']
        if PIPELINE.peek(config) is not None and config.delay_wgrad_compute:
            bound.arguments['ddp_config'] = dataclasses.replace(settings, delay_wgrad_compute=True)
            mark_delayed_parameters(bound.arguments['module'])
        original(*bound.args, **bound.kwargs)

    return __init__


PIPELINE_SCHEDULE_PATCHES = (
    Patch(
        id='schedule',
        target='megatron.core.pipeline_parallel.schedules:'
        'forward_backward_pipelining_with_interleaving',
        wrap=_run_plan,
        reason='the only entry of a pipeline with two chunks a rank, looked up when it is called',
        fingerprints=on_every_release('a99d6a32'),
        reads=('model',),
    ),
    Patch(
        id='schedule-line',
        target='megatron.core.pipeline_parallel.schedules:'
        'forward_backward_pipelining_without_interleaving',
        wrap=_run_plan,
        reason='the only entry of a pipeline with one chunk a rank, looked up when it is called',
        fingerprints=on_every_release('a99d6a32'),
        reads=('model',),
    ),
    Patch(
        id='split-linear',
        target='megatron.core.tensor_parallel.layers:'
        'linear_with_grad_accumulation_and_async_allreduce',
        wrap=_split_weight_gradient,
        reason='every tensor-parallel linear layer calls it, so weight gradients can be put off',
        fingerprints={
            '0.17': '29402846',
            '0.18': '29402846',
            '0.19': 'cc871899',
            '0.20': '07b03c36',
        },
        reads=tuple(inspect.signature(split_linear).parameters)[1:-1],
    ),
    Patch(
        id='delayed-hooks',
        target='megatron.core.distributed.distributed_data_parallel:'
        'DistributedDataParallel.__init__',
        wrap=_with_delayed_hooks,
        reason='gradients that Transformer Engine puts off must reach main_grad when they come',
        fingerprints={
            '0.17': '2390ab95',
            '0.18': '20b3aba4',
            '0.19': '20b3aba4',
            '0.20': '20b3aba4',
        },
        reads=('config', 'ddp_config', 'module'),
    ),
)
