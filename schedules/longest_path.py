"""Step time of a plan as the longest path through its operations, for many times at once.

Gives what ``simulator.simulate`` gives for a plan of computations with atomic slots, where links do
not meet: an operation starts when the one before it on its rank has ended and what it takes from
another rank has arrived. Their order does not depend on times, so a plan is walked through once;
after that a time may be a number, or an array with one number for each case.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_mhc.schedules.plan import Kind, Op, Plan

# What takes time: kind and stage; of a fused slot, those of its parts.
Work = tuple[tuple[Kind, int], ...]
# A number, or an array of numpy, which is not imported here.
Time = Any
# The step that made a result, by its kind and by ``Op.key``.
Made = dict[tuple[str, tuple[int, int, int]], int]


class Step(NamedTuple):
    """One operation, after the operations that it needs.

    Args:
        work: what it does.
        before: the step before it on its rank; -1 for none.
        sources: steps of other ranks whose results it needs; they arrive a hop later.
    """

    work: Work
    before: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """A plan, walked through.

    Args:
        steps: every operation, after those that it needs.
        lasts: the last step of each rank.
        ranks: for each rank how often it does what.
    """

    steps: tuple[Step, ...]
    lasts: tuple[int, ...]
    ranks: tuple[Counter[Work], ...]

    def makespan(
        self, duration: dict[Work, Time], hop: Time, larger: Callable[[Time, Time], Time] = max
    ) -> Time:
        """Time of the whole step.

        Args:
            duration: of each work in ``ranks``.
            hop: from one rank to another.
            larger: of two times; ``numpy.maximum`` where they are arrays.
        """
        ends: list[Time] = []
        for work, before, sources in self.steps:
            start = ends[before] if before >= 0 else 0.0
            for source in sources:
                start = larger(start, ends[source] + hop)
            ends.append(start + duration[work])
        return functools.reduce(larger, (ends[last] for last in self.lasts))


def walk(plan: Plan) -> Path:
    """The longest-path form of a plan of computations.

    Raises:
        ValueError: the plan has messages or collectives, or cannot proceed.
    """
    made: Made = {}
    steps: list[Step] = []
    position, before = [0] * plan.pp, [-1] * plan.pp
    left = sum(map(len, plan.ranks))
    while left:
        stuck = left
        for rank, ops in enumerate(plan.ranks):
            while position[rank] < len(ops):
                op = ops[position[rank]]
                sources = _sources(plan, op, made)
                if sources is None:
                    break
                steps.append(Step(_work(op), before[rank], sources))
                before[rank] = len(steps) - 1
                for leaf in op.leaves:
                    made['I' if leaf.kind is Kind.B else str(leaf.kind), leaf.key] = before[rank]
                position[rank] += 1
                left -= 1
        if left == stuck:
            raise ValueError(f'plan {plan.schedule} cannot proceed; validate the plan')
    return Path(tuple(steps), tuple(before), tuple(Counter(map(_work, ops)) for ops in plan.ranks))


def _work(op: Op) -> Work:
    return tuple((leaf.kind, leaf.stage) for leaf in op.leaves)


def _sources(plan: Plan, op: Op, made: Made) -> tuple[int, ...] | None:
    """The results of other ranks that ``op`` needs; None where a result is not there yet."""
    sources = []
    for leaf in op.leaves:
        here = plan.rank_of(leaf.stage, leaf.direction)
        for kind, stage in _needs(plan, leaf):
            source = made.get((kind, (stage, leaf.microbatch, leaf.direction)))
            if source is None:
                return None
            # What the rank itself has made is older than the step before.
            if plan.rank_of(stage, leaf.direction) != here:
                sources.append(source)
    return tuple(sources)


def _needs(plan: Plan, leaf: Op) -> list[tuple[str, int]]:
    stage = leaf.stage
    if leaf.kind is Kind.F:
        return [('F', stage - 1)] if stage else []
    if leaf.kind in (Kind.I, Kind.B):
        ahead = [('I', stage + 1)] if stage + 1 < plan.stages else []
        return [('F', stage), *ahead]
    if leaf.kind in (Kind.W, Kind.R):
        return [('I' if leaf.kind is Kind.W else 'F', stage)]
    raise ValueError(f'{leaf}: a longest path is that of a plan of computations, before lowering')
