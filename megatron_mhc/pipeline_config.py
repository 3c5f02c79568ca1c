"""The settings of a pipeline schedule that is run from a plan, checked value by value."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_mhc.schedules.catalog import forward_only, make_plan
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.schedules.validator import validate

STOCK_SCHEDULES = ('1f1b', 'interleaved')
V_SCHEDULES = ('zb-v', 'dualpipev', 'dualpipev-w')
PIPELINE_SCHEDULES = (*STOCK_SCHEDULES, *V_SCHEDULES)
STREAMS = ('compute', 'high')
W_PLACEMENTS = ('slot', 'after')
RECOMPUTE_BLOCKS = ('none', 'stage')


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline schedule on the inverted V: rank r of P holds stages P - 1 - r and P + r.

    Args:
        schedule: ``zb-v`` (arXiv 2405.15362), ``dualpipev``, or ``dualpipev-w``, whose fused slots
            leave the weight gradients until after the slot, so that both hops start earlier.
        recompute: ``stage`` drops what the mHC kernels of a stage produce and rebuilds it from the
            stage's input, as an operation of its own that waits for no message.
        recompute_stream: where it is rebuilt: ``compute``, or ``high``, a stream of high priority.
        verify_steps: run that many first steps a second time with full synchronisation and compare
            losses and gradients bit for bit.
    """

    schedule: str
    recompute: str = 'none'
    recompute_stream: str = 'compute'
    verify_steps: int = 0

    def __post_init__(self) -> None:
        for flag, value, choices in (
            ('--pipeline-schedule', self.schedule, V_SCHEDULES),
            ('--mhc-recompute-layer-num', self.recompute, RECOMPUTE_BLOCKS),
            ('--mhc-recompute-stream', self.recompute_stream, STREAMS),
        ):
            if value not in choices:
                raise ValueError(f'{flag} {value}: choose one of {", ".join(choices)}')
        if self.verify_steps < 0:
            raise ValueError(
                f'--pipeline-verify-steps {self.verify_steps}: a number of steps, 0 for none'
            )

    def plan(self, ranks: int, microbatches: int, evaluating: bool = False) -> Plan:
        """The validated plan of one step on ``ranks`` pipeline ranks, as the executor runs it.

        Raises:
            ValueError: the schedule does not exist for these numbers.
        """
        return _plan(self.schedule, self.recompute != 'none', ranks, microbatches, evaluating)


@functools.lru_cache(maxsize=64)
def _plan(schedule: str, recompute: bool, ranks: int, microbatches: int, evaluating: bool) -> Plan:
    if evaluating:
        down = tuple(range(ranks))
        plan = lower(forward_only((down + down[::-1],), microbatches), reduce=False)
    else:
        plan = lower(make_plan(schedule, ranks, microbatches), recompute=recompute)
    validate(plan)
    return plan.reversed_ranks()
