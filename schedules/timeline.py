"""What the simulator finds: when each operation of a plan runs, and what that costs.

A *makespan* bubble is step time minus work: right where the optimizer waits for all ranks, as in
Megatron with a gradient norm. A *span* bubble, *inner bubble* where it is printed, counts from a
rank's own first operation to its last, as the zero-bubble papers do (arXiv 2401.10241). They
differ; never compare one with the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_mhc.schedules.plan import Op, Plan
from megatron_mhc.schedules.times import Times
from megatron_mhc.schedules.validator import live_activations

COMPUTE_LANE, COMMUNICATION_LANE, HIGH_LANE = LANES = ('compute', 'comm', 'high')


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation in time: of ``rank``, on ``lane``, from ``start`` to ``end``.

    A SEND's entry is its tensor's way to the other rank.
    """

    rank: int
    op: Op
    start: float
    end: float
    lane: str


@dataclass(frozen=True)
class Timeline:
    """The simulated step of ``plan``, in the unit of its ``Times``.

    Args:
        plan: what ran.
        entries: by start.
        exposed_hops: per rank, for how long its compute waited while the tensor it waited for was
            on its way.
        times: what the operations were said to take.
    """

    plan: Plan
    entries: tuple[Entry, ...]
    exposed_hops: tuple[float, ...]
    times: Times

    @cached_property
    def makespan(self) -> float:
        """Time of the whole step."""
        return max((entry.end for entry in self.entries), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the time its compute lane works."""
        total = [0.0] * self.plan.pp
        for entry in self.entries:
            if entry.lane == COMPUTE_LANE:
                total[entry.rank] += entry.end - entry.start
        return tuple(total)

    @property
    def work(self) -> float:
        """What the busiest rank computes: no order of operations makes the step shorter."""
        return max(self.busy)

    @property
    def bubble(self) -> float:
        """Makespan bubble: the step minus the busiest rank's work."""
        return self.makespan - self.work

    @property
    def bubble_share(self) -> float:
        """Makespan bubble as a share of the step."""
        return self.bubble / self.makespan if self.makespan else 0.0

    @cached_property
    def span_bubbles(self) -> tuple[float, ...]:
        """Per rank, its idle time between its first and its last operation."""
        found = []
        for rank, busy in enumerate(self.busy):
            mine = [e for e in self.entries if e.rank == rank and e.lane == COMPUTE_LANE]
            span = max(e.end for e in mine) - min(e.start for e in mine) if mine else 0.0
            found.append(span - busy)
        return tuple(found)

    @property
    def span_bubble(self) -> float:
        """The largest span bubble of a rank."""
        return max(self.span_bubbles)

    @property
    def exposed_hop(self) -> float:
        """The longest that a rank waits for tensors on their way."""
        return max(self.exposed_hops)

    @cached_property
    def peak_live(self) -> float:
        """Most activations that a rank holds at once, in those of a whole rank and microbatch."""
        if self.plan.forward_only:
            # Without a backward nothing is kept.
            return self.plan.pp / self.plan.stages
        return max(live_activations(self.plan))
