"""The settings of a pipeline schedule that is run from a plan, checked value by value."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_mhc.argument_types import MOST_TOKENS, check_integer
from megatron_mhc.schedules.catalog import forward_only, make_plan
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.schedules.validator import validate

STOCK_SCHEDULES = ('1f1b', 'interleaved')
V_SCHEDULES = ('zb-v', 'dualpipev', 'dualpipev-w')
PIPELINE_SCHEDULES = (*STOCK_SCHEDULES, *V_SCHEDULES)
STREAMS = ('compute', 'high')
W_PLACEMENTS = ('slot', 'after')


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline schedule on the inverted V: rank r of P holds stages P - 1 - r and P + r.

    Args:
        schedule: ``zb-v`` (arXiv 2405.15362), ``dualpipev``, or ``dualpipev-w``, whose fused slots
            leave the weight gradients until after the slot, so that both hops start earlier.
        verify_steps: run that many first steps a second time with full synchronisation and compare
            losses and gradients bit for bit.
    """

    schedule: str
    verify_steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in V_SCHEDULES:
            raise ValueError(
                f'--pipeline-schedule {self.schedule}: choose one of {", ".join(V_SCHEDULES)}'
            )
        check_integer(
            '--pipeline-verify-steps', self.verify_steps, 0, MOST_TOKENS, 'it counts steps, 0 none'
        )

    def plan(
        self, ranks: int, microbatches: int, evaluating: bool = False, recompute: bool = False
    ) -> Plan:
        """The validated plan of one step on ``ranks`` pipeline ranks, as the executor runs it.

        ``recompute`` gives an operation of its own, which waits for no message, to rebuilding the
        block of sublayers that a backward begins with.

        Raises:
            ValueError: the schedule does not exist for these numbers.
        """
        return _plan(self.schedule, recompute, ranks, microbatches, evaluating)


@functools.lru_cache(maxsize=64)
def _plan(schedule: str, recompute: bool, ranks: int, microbatches: int, evaluating: bool) -> Plan:
    if evaluating:
        down = tuple(range(ranks))
        plan = lower(forward_only((down + down[::-1],), microbatches), reduce=False)
    else:
        plan = lower(make_plan(schedule, ranks, microbatches), recompute=recompute)
    validate(plan)
    return plan.reversed_ranks()
