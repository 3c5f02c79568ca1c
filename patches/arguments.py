"""Patch: Megatron's argument parser. The only residual patch that a ``standard`` run sees.

It adds our flags, and hooks the parser so that everything wrong is said in one line as soon as the
values are known: before a process group, a model or a dataset exists. The other patches are applied
at that point, and only for a residual type that needs them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from megatron_mhc.checkpoints.check import check_checkpoints, found_checkpoints
from megatron_mhc.compat import require_one_tree
from megatron_mhc.engram.resume import check_memory
from megatron_mhc.inputs.refusal import is_first_of_node, refuse, with_remedy
from megatron_mhc.optim.lr_steps import takes_steps
from megatron_mhc.patches.engine import Patch, apply, on_every_release
from megatron_mhc.patches.hybrid_mixers import check_mixers
from megatron_mhc.patches.hybrid_pattern import check_hybrid_pattern
from megatron_mhc.patches.parse_hook import after_parsing
from megatron_mhc.pipeline.embedding_copies import check_embedding_copies
from megatron_mhc.runtime.kernel_choice import announce_kernels
from megatron_mhc.settings.flags_engram import resolve_engram
from megatron_mhc.settings.flags_lr import offer_steps, resolve_lr_steps
from megatron_mhc.settings.flags_monitor import resolve_monitor
from megatron_mhc.settings.flags_pipeline import resolve_pipeline
from megatron_mhc.settings.flags_residual import resolve_arguments
from megatron_mhc.settings.groups import EVERY_GROUP
from megatron_mhc.settings.megatron_sizes import check_sizes
from megatron_mhc.settings.names import PLANNED_SCHEDULES
from megatron_mhc.settings.refusals import check_residual
from megatron_mhc.settings.refused_post_stream import POST_STREAM
from megatron_mhc.settings.shared_flags import add_groups, hand_over

OWN_FLAGS = (
    '--residual-type',
    '--mhc-',
    '--hc-',
    '--mudd-',
    '--gated-residual-',
    '--attention-residual-',
    '--engram-',
    '--pipeline-schedule',
    '--pipeline-w-placement',
    '--pipeline-verify-steps',
    '--pipeline-live-bound',
    '--lr-step-',
)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args, **kwargs):
        parser = original(parser, *args, **kwargs)
        shared = add_groups(parser, EVERY_GROUP)
        offer_steps(parser)
        # On this instance alone; it raises, which a partial does not say.
        error = functools.partial(_error, parser, parser.error)
        parser.error = error  # type: ignore[method-assign, assignment]
        after_parsing(parser, functools.partial(accept, shared=shared))
        return parser

    return add_megatron_arguments


def accept(
    namespace: argparse.Namespace,
    unknown: list[str],
    shared: Mapping[str, argparse.Action] = MappingProxyType({}),
) -> None:
    """Validate the parsed flags and apply the patches that they need."""
    # Imported here: the patches import megatron.core, which --help does not need.
    from megatron_mhc.patches.combined_passes import COMBINED_PASSES_PATCHES
    from megatron_mhc.patches.lr_steps import LR_STEPS_PATCH
    from megatron_mhc.patches.monitor import MONITOR_PATCHES
    from megatron_mhc.patches.registry import (
        ENGRAM_PATCHES,
        MODEL_PATCHES,
        RESIDUAL_PATCHES,
        SCHEDULE_TRAINING_PATCHES,
        TRAINING_PATCHES,
        schedule_patches,
    )

    require_one_tree()
    # A misspelt flag of ours must not pass where the script tolerates unknown ones.
    for token in unknown:
        if token.startswith(OWN_FLAGS):
            raise ValueError(f'argument {token}: no such flag; --help lists residual connections')
    check_sizes(namespace)
    hand_over(namespace, shared)
    residual = resolve_arguments(namespace, shared)
    check_residual(namespace, residual)
    if residual.enabled or namespace.pipeline_schedule in PLANNED_SCHEDULES:
        check_hybrid_pattern(namespace)
    check_mixers(namespace)
    # One reader a node: what it refuses ends the others there too.
    checkpoints = found_checkpoints(namespace) if is_first_of_node() else []
    check_checkpoints(namespace, residual, checkpoints)
    announce_kernels(namespace, residual)
    engram = resolve_engram(namespace)
    check_memory(namespace, engram, checkpoints)
    pipeline = resolve_pipeline(namespace)
    resolve_lr_steps(namespace)
    monitor = resolve_monitor(namespace)
    high = namespace.mhc_post_stream == 'high'
    ours = residual.enabled or engram is not None or pipeline is not None or high
    check_embedding_copies(namespace, patched=ours)
    if residual.enabled:
        apply(RESIDUAL_PATCHES + TRAINING_PATCHES)
    if engram is not None:
        apply(ENGRAM_PATCHES + TRAINING_PATCHES)
    if (residual.enabled or engram is not None) and namespace.overlap_moe_expert_parallel_comm:
        apply(COMBINED_PASSES_PATCHES)
    if pipeline is not None:
        apply(schedule_patches(pipeline) + SCHEDULE_TRAINING_PATCHES)
    if takes_steps(namespace):
        apply((LR_STEPS_PATCH,))
    if monitor is not None:
        apply(MONITOR_PATCHES)
    if high:
        POST_STREAM.check(namespace)
        apply(MODEL_PATCHES)


def _error(parser: argparse.ArgumentParser, original: Callable[..., Any], message: str) -> None:
    """Megatron's usage text is hundreds of lines long; for our flags the one line is enough."""
    if message.startswith(tuple(f'argument {flag}' for flag in OWN_FLAGS)):
        refuse(parser.prog, with_remedy(parser.prog, message))
    original(message)


ARGUMENTS_PATCH = Patch(
    id='arguments',
    target='megatron.training.arguments:add_megatron_arguments',
    wrap=_wrap,
    reason='parse_args looks this name up when it is called, so scripts keep their own providers',
    fingerprints=on_every_release('6904cd4c'),
    reads=('parser',),
)
