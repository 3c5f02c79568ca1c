"""The plan of one step on the inverted V, and its proof; each is made once.

Apart from ``PipelineConfig``, whose flags need no generators.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

from megatron_mhc.schedules.catalog import make_plan, obstacle, placement_of, too_many
from megatron_mhc.schedules.generate_line import forward_only
from megatron_mhc.schedules.inverted_v import CHUNKS
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.schedules.validator import validate


def check_numbers(schedule: str, ranks: int, microbatches: int) -> None:
    """Raise ValueError where the schedule does not exist for these numbers."""
    reason = obstacle(schedule, ranks, microbatches)
    if reason is not None:
        raise ValueError(f'--pipeline-schedule {schedule}: {reason}')
    reason = too_many(ranks, microbatches, CHUNKS)
    if reason is not None:
        raise ValueError(f'--global-batch-size with --pipeline-schedule: {reason}')


@functools.lru_cache(maxsize=64)
def plan_of(
    schedule: str,
    rank: int,
    ranks: int,
    microbatches: int,
    evaluating: bool = False,
    recompute: bool = False,
) -> Plan:
    """What pipeline rank ``rank`` of ``ranks`` does in one step, as the executor runs it.

    It is checked as far as the rank and its neighbours see; ``prove`` does the rest. ``recompute``
    gives an operation of its own, which waits for no message, to rebuilding the segment that a
    backward begins with.

    Raises:
        ValueError: the schedule does not exist for these numbers.
    """
    # On the V, whose ranks the inverted V names the other way round.
    own = ranks - 1 - rank
    seen = range(max(0, own - 1), min(ranks, own + 2))
    plan = _lowered(schedule, ranks, microbatches, evaluating, recompute, seen)
    validate(plan, ranks=seen)
    kept = tuple(ops if holder == own else () for holder, ops in enumerate(plan.ranks))
    return plan.with_ranks(kept).reversed_ranks()


@functools.lru_cache(maxsize=64)
def prove(
    schedule: str,
    ranks: int,
    microbatches: int,
    evaluating: bool = False,
    recompute: bool = False,
) -> None:
    """Raise ValueError for a step that cannot run to its end, or would compute something else.

    Looks at all operations of all ranks, once: one rank does it for its pipeline.
    """
    validate(_lowered(schedule, ranks, microbatches, evaluating, recompute))


def _lowered(
    schedule: str,
    ranks: int,
    microbatches: int,
    evaluating: bool,
    recompute: bool,
    only: Collection[int] | None = None,
) -> Plan:
    if evaluating:
        plan = forward_only(placement_of('v', ranks), microbatches, only=only)
        return lower(plan, reduce=False)
    return lower(make_plan(schedule, ranks, microbatches, only=only), recompute=recompute)
