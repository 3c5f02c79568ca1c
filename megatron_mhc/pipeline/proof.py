"""The whole proof of a plan, once in every pipeline: its first rank tells the others."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_mhc.schedules.plan import Plan
from megatron_mhc.settings import step_plan
from megatron_mhc.settings.pipeline import PipelineConfig

# What the ranks of a group have been told is right; they ask in the same order. By their numbers: a
# group that is kept here would outlive its end.
_proved: set[tuple[Any, ...]] = set()


def proved_plan(
    pipeline: PipelineConfig,
    group: dist.ProcessGroup,
    microbatches: int,
    evaluating: bool,
    recompute: bool,
) -> Plan:
    """This rank's part of a plan that can run to its end on all ranks of ``group``.

    Each rank checks what it and its neighbours do. What only all operations together show, the
    first rank finds out, the first time that a plan is asked for; of the job for the plans that a
    command line names, else of each pipeline.

    Args:
        pipeline: which schedule.
        group: the pipeline-parallel group; all of its ranks call this.
        microbatches: of the step, m.
        evaluating: forward passes only.
        recompute: with operations that rebuild.

    Raises:
        ValueError: the plan must not run, or does not exist for this number of microbatches.
    """
    settings = group.size(), microbatches, evaluating, recompute, pipeline.live_bound
    plan = step_plan.plan_of(pipeline.schedule, group.rank(), *settings)
    ranks = tuple(dist.get_process_group_ranks(group))
    key = pipeline.schedule, group.rank(), ranks, *settings
    if key not in _proved and not step_plan.is_promised(pipeline.schedule, *settings):
        wrong: list[str | None] = [None]
        if group.rank() == 0:
            try:
                step_plan.prove(pipeline.schedule, *settings)
            except ValueError as error:
                wrong = [str(error)]
        dist.broadcast_object_list(wrong, group=group, group_src=0)
        if wrong[0] is not None:
            raise ValueError(wrong[0])
        _proved.add(key)
    return plan
