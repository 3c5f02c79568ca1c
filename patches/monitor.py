"""Patches of the monitors: the training loop, the end of the backward, and Megatron's log step."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_mhc.inputs.refusal import is_first_rank
from megatron_mhc.monitor.alarm import largest_ranks, trouble
from megatron_mhc.monitor.collect import Monitor
from megatron_mhc.monitor.output import write
from megatron_mhc.monitor.reduce import gather
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.hybrid_pattern import pattern_of
from megatron_mhc.settings.flags_monitor import monitor_config_from_args
from megatron_mhc.settings.flags_residual import parsed_arguments, residual_config_from_args

STATUS = 3
_current: Monitor | None = None


def _watch(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def train(*args, **kwargs):
        global _current
        arguments = parsed_arguments()
        settings = monitor_config_from_args(arguments)
        if settings is None:
            return original(*args, **kwargs)
        model = signature.bind(*args, **kwargs).arguments['model']
        # Megatron counts the step that runs from 0, and logs it from 1.
        _current = Monitor(model, settings, lambda: arguments.curr_iteration + 1)
        try:
            return original(*args, **kwargs)
        finally:
            _current.detach()
            _current = None

    return train


def _note_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    def finalize_model_grads(*args, **kwargs):
        result = original(*args, **kwargs)
        if _current is not None:
            _current.after_backward()
        return result

    return finalize_model_grads


def _report(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def training_log(*args, **kwargs):
        result = original(*args, **kwargs)
        if _current is not None:
            report(_current, signature.bind(*args, **kwargs).arguments)
        return result

    return training_log


def report(monitor: Monitor, step: dict[str, Any]) -> None:
    """Write what was measured and raise the alarm, at the end of a step.

    A gradient norm is known to every rank without a further synchronisation, and alike, so that it
    may call for a report at any step.

    Args:
        step: the arguments of ``training_log``.
    """
    from megatron.training.async_utils import maybe_finalize_async_save
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    args, settings = parsed_arguments(), monitor.settings
    # A step is logged by Megatron's training, which has parsed them.
    assert args is not None
    norm = None if step['skipped_iter'] else step['grad_norm']
    broken = settings.alarm != 'off' and norm is not None and not math.isfinite(norm)
    sampled = monitor.is_due(step['iteration'])
    if not (sampled or (broken and not monitor.broken)):
        return
    streams = residual_config_from_args(args).streams
    # A loss per token is divided when all tokens are counted, after the backward.
    microbatches = 1 if args.calculate_per_token_loss else get_num_microbatches()
    numbers = streams, sampled, step['loss_scale'], microbatches
    found = gather(monitor, args.num_layers, *numbers, pattern_of(args) or '')
    writer = get_tensorboard_writer()
    if args.mhc_monitor and sampled:
        write(found, step['iteration'], settings.per_layer, writer, get_wandb_writer())
    # Said again at the next interval only, if the run goes on.
    monitor.broken = broken
    monitor.ranks = largest_ranks(found, monitor.ranks)
    line = trouble(found, settings, norm, monitor.ranks) if settings.alarm != 'off' else None
    if line is None:
        return
    ends = settings.alarm == 'stop' or (broken and settings.stops_at_nan)
    if is_first_rank():
        end = '; the run ends here, unsaved' if ends else ''
        message = f'[megatron-mhc] alarm at iteration {step["iteration"]}: {line}{end}'
        print(message, file=sys.stderr, flush=True)
    if ends:
        if writer:
            writer.flush()
        # A checkpoint of earlier steps may still be on its way to the disk.
        maybe_finalize_async_save(blocking=True, terminate=True)
        # torchrun ends the ranks that are left as soon as one is gone.
        torch.distributed.barrier()
        sys.exit(STATUS)


MONITOR_PATCHES = (
    Patch(
        id='monitor-train',
        target='megatron.training.training:train',
        wrap=_watch,
        reason='the first point where every chunk is built and wrapped, and the last one that ends',
        fingerprints={
            '0.17': 'a96bbeaa',
            '0.18': 'a96bbeaa',
            '0.19': '219758b7',
            '0.20': '219758b7',
        },
        reads=('model',),
    ),
    Patch(
        id='monitor-gradients',
        target='megatron.training.training:finalize_model_grads',
        wrap=_note_gradients,
        reason='gradients are reduced when it returns, and the optimizer has not clipped them yet',
        fingerprints=on_every_release('d8b6e344'),
    ),
    Patch(
        id='monitor-log',
        target='megatron.training.training:training_log',
        wrap=_report,
        reason='runs after every step on every rank and knows iteration, gradient norm and scale',
        fingerprints={
            '0.17': '8eb0480f',
            '0.18': '7d6d7fea',
            '0.19': '7d6d7fea',
            '0.20': '7d6d7fea',
        },
        reads=('iteration', 'loss_scale', 'skipped_iter', 'grad_norm'),
    ),
)
