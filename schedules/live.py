"""Activations that the ranks of a pipeline hold at their peak."""

from __future__ import annotations

import functools

from megatron_mhc.schedules.catalog import SCHEDULES, make_plan, obstacle
from megatron_mhc.schedules.validator import live_activations


def live_at_peak(
    schedule: str, pp: int, microbatches: int, chunks: int, live_bound: float | None = None
) -> tuple[float, ...]:
    """``live_activations`` of every pipeline rank in Megatron's order.

    Raises:
        ValueError: the schedule does not exist for these numbers.
    """
    reason = obstacle(schedule, pp, microbatches, chunks=chunks, live_bound=live_bound)
    if reason is not None:
        raise ValueError(reason)
    # From 2 P + 1 on more microbatches change nothing; a multiple of P suits every schedule.
    return _live_at_peak(schedule, pp, min(microbatches, 4 * pp), chunks, live_bound)


@functools.cache
def _live_at_peak(
    schedule: str, pp: int, microbatches: int, chunks: int, live_bound: float | None
) -> tuple[float, ...]:
    plan = make_plan(schedule, pp, microbatches, chunks=chunks, live_bound=live_bound)
    live = live_activations(plan)
    # A plan counts its V from the rank with both ends; Megatron's last rank has them.
    return live[::-1] if SCHEDULES[schedule].placement == 'v' else live
