"""One training or evaluation step of Megatron, run from a plan.

``run_pipeline_step`` takes the arguments of Megatron's own schedules and does what they do around
the passes: gradient synchronisation, timers, token counts, the final reduction. What the passes do
is Megatron's ``forward_step`` and ``backward_step`` with the user's forward function; their order
is the plan's.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config
from torch import nn

from megatron_mhc.pipeline.chunk_stage import ChunkStage
from megatron_mhc.pipeline.edges import transport_for
from megatron_mhc.pipeline.mirrored_copies import (
    shared_losses,
    split_batches,
    sum_copies,
)
from megatron_mhc.pipeline.proof import proved_plan
from megatron_mhc.pipeline.verify import run_twice
from megatron_mhc.schedules.executor import in_turn, run_plan
from megatron_mhc.schedules.executor_channels import Transport
from megatron_mhc.schedules.executor_lanes import run_lanes
from megatron_mhc.schedules.mirrored import chunk_of
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.settings.model_config import POST_STREAM, RESIDUAL
from megatron_mhc.settings.pipeline import PipelineConfig

# Training steps so far, by the first chunk of a model.
_STEPS_BEGUN: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def run_pipeline_step(
    pipeline: PipelineConfig,
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any] | list[Iterator[Any] | None] | None,
    model: list[nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
    p2p_communicator: Any = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
) -> list[Any]:
    """Run all microbatches; returns the last stage's loss records, elsewhere an empty list.

    The arguments are those of Megatron's ``forward_backward_pipelining_with_interleaving`` and
    ``..._without_interleaving``; ``pipeline`` says which plan to run.

    Raises:
        ValueError: the schedule does not exist for this number of microbatches.
        RuntimeError: a message did not arrive, or ``--pipeline-verify-steps`` found a difference.
    """
    del decoder_seq_length
    if adjust_tensor_shapes_fn is not None:
        raise NotImplementedError(
            f'--pipeline-schedule {pipeline.schedule}: adjusted tensor shapes (distillation) are '
            'not supported; use --pipeline-schedule 1f1b'
        )
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    config = get_model_config(model[0])
    group = parallel_state.get_pipeline_model_parallel_group()
    context_size = parallel_state.get_context_parallel_world_size()
    if p2p_communicator is not None:
        group, context_size = p2p_communicator.pp_group, pg_collection.cp.size()
    rebuilds = _recompute_stream(config) is not None
    if pipeline.mirrored:
        iterators = split_batches(iterators, group, num_microbatches, forward_only)
    plan = proved_plan(pipeline, group, num_microbatches, forward_only, rebuilds)
    transport = transport_for(config, plan, group, seq_length // context_size, micro_batch_size)

    forward = _Forward(
        forward_step_func,
        model,
        config,
        num_microbatches,
        context_size,
        evaluating=forward_only,
        first_val_step=first_val_step,
        collect_non_loss_data=collect_non_loss_data,
    )
    passes = _Passes(
        config, model, plan, group.rank(), transport, forward, forward_only, pipeline.mirrored
    )
    with _timed(config):
        if forward_only:
            losses = passes.run(iterators, False, False)
            return shared_losses(losses, group) if pipeline.mirrored else losses
        gather_parameters(config, model)
        with gradient_sync_off(model):
            if verifies_next_step(model[0], pipeline):
                losses = run_twice(passes.run, model, iterators)
            else:
                early = not force_all_reduce and all(map(overlaps_reduction, model))
                # Copies of a stage add up what they have before data-parallel ranks do.
                early = early and not pipeline.mirrored
                losses = passes.run(iterators, False, early)
        if pipeline.mirrored:
            sum_copies(model, group)
        ends = group if pipeline.mirrored else None
        finalize(config, model, passes.stages, pg_collection, force_all_reduce, ends)
    return shared_losses(losses, group) if pipeline.mirrored else losses


@dataclass(frozen=True)
class _Forward:
    """Megatron's forward of one microbatch through one chunk; what a step has in common."""

    forward_step_func: Callable[..., Any]
    model: list[nn.Module]
    config: Any
    num_microbatches: int
    context_size: int
    evaluating: bool
    first_val_step: bool | None
    collect_non_loss_data: bool

    def __call__(
        self,
        iterator: Iterator[Any] | None,
        losses: list[Any],
        chunk: int,
        is_last: bool,
        microbatch: int,
        x: torch.Tensor | None,
    ) -> Any:
        return schedules.forward_step(
            self.forward_step_func,
            iterator,
            self.model[chunk],
            self.num_microbatches,
            x,
            losses,
            self.config,
            cp_group_size=self.context_size,
            collect_non_loss_data=self.collect_non_loss_data,
            is_first_microbatch=schedules.check_first_val_step(
                self.first_val_step, self.evaluating, microbatch == 0
            ),
            current_microbatch=microbatch,
            vp_stage=chunk if len(self.model) > 1 else None,
            is_last_stage=is_last,
        )


@dataclass
class _Passes:
    """What the plan orders on this rank; ``forward`` is Megatron's, of any chunk."""

    config: Any
    model: list[nn.Module]
    plan: Plan
    rank: int
    transport: Transport
    forward: Callable[..., Any]
    evaluating: bool
    mirrored: bool = False
    stages: dict[tuple[int, int], ChunkStage] = field(default_factory=dict)

    def run(
        self, iterators: list[Iterator[Any] | None], synchronous: bool, early: bool
    ) -> list[Any]:
        """All of them; returns the loss records."""
        losses: list[Any] = []
        held = self.plan.chunks[self.rank]
        for number, (stage, direction) in enumerate(held):
            # Of two copies the rank's earlier stage is its first chunk, else they are in order.
            chunk = chunk_of(stage, self.plan.pp) if self.mirrored else number
            is_last = stage == self.plan.stages - 1
            self.stages[stage, direction] = ChunkStage(
                self.model[chunk],
                self.config,
                functools.partial(self.forward, iterators[chunk], losses, chunk, is_last),
                is_last=is_last,
                evaluating=self.evaluating,
                recompute_stream=_recompute_stream(self.config),
                reduces=early,
            )
        # Only where something is launched on a side stream is there a reason to take turns. A layer
        # that runs again has the random numbers of its first run, which a hand-over would lend.
        takes_turns = self.config.num_moe_experts or POST_STREAM.peek(self.config) == 'high'
        takes_turns = takes_turns and self.config.recompute_granularity != 'full'
        fused = run_lanes if takes_turns else in_turn
        run_plan(
            self.plan, self.rank, self.stages, self.transport, fused=fused, synchronous=synchronous
        )
        return losses


def _recompute_stream(config: Any) -> str | None:
    return getattr(RESIDUAL.peek(config), 'recompute_stream', None)


@contextlib.contextmanager
def _timed(config: Any) -> Iterator[None]:
    if config.timers is not None:
        config.timers('forward-backward', log_level=1).start(barrier=config.barrier_with_L1_time)
    yield
    if config.timers is not None:
        config.timers('forward-backward').stop()


@contextlib.contextmanager
def gradient_sync_off(model: list[nn.Module]) -> Iterator[None]:
    """Leave the start of gradient reductions to the plan.

    By itself, a bucket is reduced as soon as the last microbatch has been through all its
    parameters, too early for weight gradients of other microbatches that are still to come.
    """
    with contextlib.ExitStack() as stack:
        for chunk in model:
            if (no_sync := getattr(chunk, 'no_sync', None)) is not None:
                stack.enter_context(no_sync())
        yield


def finalize(
    config: Any,
    model: list[nn.Module],
    stages: dict[tuple[int, int], ChunkStage],
    pg_collection: Any,
    force_all_reduce: bool | None,
    mirrored: dist.ProcessGroup | None = None,
) -> None:
    """Reduce gradients and scale them, by Megatron's own function.

    ``mirrored`` is the pipeline-parallel group where both of its ends compute losses.
    """
    if config.finalize_model_grads_func is None:
        return
    tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
    for stage in stages.values():
        tokens += stage.tokens
    if mirrored is not None and config.calculate_per_token_loss:
        # Each end has counted those of its copy.
        dist.all_reduce(tokens, group=mirrored)
    config.finalize_model_grads_func(
        model,
        tokens if config.calculate_per_token_loss else None,
        pg_collection=pg_collection,
        force_all_reduce=force_all_reduce,
    )


def verifies_next_step(chunk: nn.Module, pipeline: PipelineConfig) -> bool:
    """Whether ``--pipeline-verify-steps`` covers the step of this model that begins now."""
    begun = _STEPS_BEGUN.get(chunk, 0)
    _STEPS_BEGUN[chunk] = begun + 1
    return begun < pipeline.verify_steps


def gather_parameters(config: Any, model: list[nn.Module]) -> None:
    """Start gathering the parameters of all chunks, first the one whose forward is first.

    For ``--overlap-param-gather`` where ranks are to do it together; otherwise the first module
    that needs a bucket starts it.
    """
    functions = config.param_sync_func
    if functions is None:
        return
    chunks = functions if isinstance(functions, list) else [functions]
    for function, chunk in zip(chunks, model, strict=True):
        function(chunk.parameters())


def overlaps_reduction(chunk: nn.Module) -> bool:
    """Whether the chunk's gradients may be reduced while the backward still runs."""
    settings = getattr(chunk, 'ddp_config', None)
    return bool(
        settings is not None
        and settings.overlap_grad_reduce
        # Several instances have no handle by which a second start could be told apart.
        and getattr(settings, 'num_distributed_optimizer_instances', 1) == 1
    )
