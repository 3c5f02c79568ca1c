"""The plan of one step in Megatron, and its proof; each is made once.

Apart from ``PipelineConfig``, whose flags need no generators.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Collection, Iterator

from megatron_mhc.schedules.catalog import (
    SCHEDULES,
    make_plan,
    obstacle,
    placement_of,
    too_many,
)
from megatron_mhc.schedules.generate_line import forward_only
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.schedules.validator import validate


def check_numbers(
    schedule: str, ranks: int, microbatches: int, live_bound: float | None = None
) -> None:
    """Raise ValueError where the schedule does not exist for these numbers."""
    reason = obstacle(schedule, ranks, microbatches, live_bound=live_bound)
    if reason is not None:
        bound = '' if live_bound is None else f' --pipeline-live-bound {live_bound:g}'
        raise ValueError(f'--pipeline-schedule {schedule}{bound}: {reason}')
    reason = too_many(ranks, microbatches, SCHEDULES[schedule].chunks or 1)
    if reason is not None:
        raise ValueError(f'--global-batch-size with --pipeline-schedule: {reason}')


# What the first rank of the job proves before any other gets to its first step.
_promised: set[tuple[object, ...]] = set()


def promise(schedule: str, *settings: object) -> None:
    """Note that the first rank of the job proves this; it ends the job where it cannot."""
    _promised.add((schedule, *settings))


def is_promised(schedule: str, *settings: object) -> bool:
    """Whether this process may leave the proof to the first rank; alike on all ranks."""
    return (schedule, *settings) in _promised


@functools.lru_cache(maxsize=64)
def plan_of(
    schedule: str,
    rank: int,
    ranks: int,
    microbatches: int,
    evaluating: bool = False,
    recompute: bool = False,
    live_bound: float | None = None,
) -> Plan:
    """What pipeline rank ``rank`` of ``ranks`` does in one step, as the executor runs it.

    It is checked as far as the rank and its neighbours see; ``prove`` does the rest. ``recompute``
    gives an operation of its own, which waits for no message, to rebuilding the segment that a
    backward begins with.

    Raises:
        ValueError: the schedule does not exist for these numbers.
    """
    # The inverted V names the ranks of the V the other way round.
    on_v = SCHEDULES[schedule].placement == 'v'
    own = ranks - 1 - rank if on_v else rank
    seen = range(max(0, own - 1), min(ranks, own + 2))
    with _without_collections():
        plan = _lowered(schedule, ranks, microbatches, evaluating, recompute, live_bound, seen)
        validate(plan, ranks=seen)
    kept = tuple(ops if holder == own else () for holder, ops in enumerate(plan.ranks))
    plan = plan.with_ranks(kept)
    return plan.reversed_ranks() if on_v else plan


@functools.lru_cache(maxsize=64)
def prove(
    schedule: str,
    ranks: int,
    microbatches: int,
    evaluating: bool = False,
    recompute: bool = False,
    live_bound: float | None = None,
) -> None:
    """Raise ValueError for a step that cannot run to its end, or would compute something else.

    Or would hold more microbatches at once than ``live_bound``.

    Looks at all operations of all ranks, once: one rank does it for its pipeline, or for the job.
    """
    with _without_collections():
        plan = _lowered(schedule, ranks, microbatches, evaluating, recompute, live_bound)
        validate(plan, live_bound=live_bound)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Millions of operations are made, none of them in a cycle; collections take half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lowered(
    schedule: str,
    ranks: int,
    microbatches: int,
    evaluating: bool,
    recompute: bool,
    live_bound: float | None = None,
    only: Collection[int] | None = None,
) -> Plan:
    if evaluating:
        # Of two copies of the model, one does.
        placement = placement_of(SCHEDULES[schedule].placement, ranks)[:1]
        return lower(forward_only(placement, microbatches, only=only), reduce=False)
    plan = make_plan(schedule, ranks, microbatches, only=only, live_bound=live_bound)
    return lower(plan, recompute=recompute)
