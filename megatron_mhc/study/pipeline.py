"""Pipeline steps of many layouts at once, as the schedule simulator has them.

Cases with one plan are arrays on one longest path through it. Steps of more than ``EXACT`` x P
microbatches grow by the same time for every P more, as far as the longest path does
(``docs/study.md``).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.longest_path import Path, Work, walk
from megatron_mhc.schedules.lowering import place_recompute
from megatron_mhc.schedules.plan import Kind
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.study.seconds import Costs

if TYPE_CHECKING:
    from numpy import ndarray

EXACT = 16
# Numbers held at a time: steps of a plan x cases.
_LARGEST = 4_000_000
_ROWS = ('forward', 'input_grad', 'weight_grad', 'recompute', 'exchange', 'again')


@dataclass(frozen=True)
class Case:
    """One layout of one model.

    Args:
        layout: the ranks.
        microbatches: m.
        stages: costs in forward order.
        hop: seconds from rank to rank.
        slot_overlap: share of the all-to-all that a fused slot can hide, and does.
    """

    layout: Layout
    microbatches: int
    stages: list[Costs]
    hop: float
    slot_overlap: float = 1.0


class Step(NamedTuple):
    """Seconds of the pipeline in one step.

    Args:
        makespan: all of it.
        work: what the busiest rank computes, all-to-all included that nothing hides.
        hops: by how much the makespan is longer than without time between ranks.
        exchange: the same of the all-to-all.
    """

    makespan: float
    work: float
    hops: float
    exchange: float

    @property
    def bubble_share(self) -> float:
        """Makespan bubble by makespan, as ``schedules.timeline`` has it."""
        return (self.makespan - self.work) / self.makespan


class _Key(NamedTuple):
    schedule: str
    pp: int
    microbatches: int
    chunks: int
    rebuilt: bool


def run_steps(cases: list[Case], advance: Callable[[int], object] = bool) -> list[Step]:
    """The step of each case.

    Args:
        cases: in any order.
        advance: told how many more are done.
    """
    groups: dict[_Key, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        layout = case.layout
        schedule = layout.schedule if layout.pp > 1 else '1f1b'
        rebuilt = any(stage.recompute for stage in case.stages)
        groups[_Key(schedule, layout.pp, case.microbatches, layout.vpp, rebuilt)].append(index)
    steps: dict[int, Step] = {}
    for key, indices in groups.items():
        for index, step in zip(indices, _run(key, [cases[i] for i in indices]), strict=True):
            steps[index] = step
        advance(len(indices))
    return [steps[index] for index in range(len(cases))]


def _run(key: _Key, cases: list[Case]) -> list[Step]:
    pp, m = key.pp, key.microbatches
    if m <= EXACT * pp:
        return [Step(*row) for row in _simulated(key, cases).tolist()]
    near = (EXACT - 1) * pp + m % pp
    first = _simulated(key._replace(microbatches=near), cases)
    second = _simulated(key._replace(microbatches=near + pp), cases)
    grown = second + (second - first) * ((m - near - pp) / pp)
    # Differences of long steps can fall below 0 by rounding.
    return [Step(*row) for row in grown.clip(0).tolist()]


def _simulated(key: _Key, cases: list[Case]) -> ndarray:
    """Rows of ``Step`` for exactly this plan."""
    import numpy

    path = _path(key)
    size = max(1, _LARGEST // len(path.steps) // 3)
    parts = [cases[i : i + size] for i in range(0, len(cases), size)]
    return numpy.concatenate([_times(path, part) for part in parts])


@functools.lru_cache(maxsize=64)
def _path(key: _Key) -> Path:
    plan = make_plan(key.schedule, key.pp, key.microbatches, chunks=key.chunks)
    return walk(place_recompute(plan) if key.rebuilt else plan)


def _times(path: Path, cases: list[Case]) -> ndarray:
    import numpy

    rows = {
        row: numpy.array([[getattr(stage, row) for case in cases for stage in case.stages]])
        .reshape(len(cases), -1)
        .T
        for row in _ROWS
    }
    hop = numpy.array([case.hop for case in cases])
    overlap = numpy.array([case.slot_overlap for case in cases])
    count = len(cases)
    # As they are, without hops, without all-to-all: three columns of a case.
    rows = {row: numpy.tile(values, 3) for row, values in rows.items()}
    rows['exchange'][:, 2 * count :] = 0
    rows['again'][:, 2 * count :] = 0
    hop, overlap = numpy.tile(hop, 3), numpy.tile(overlap, 3)
    hop[count : 2 * count] = 0
    works = {work for rank in path.ranks for work in rank}
    duration = {work: _duration(work, rows, overlap, numpy.minimum) for work in works}
    makespan = path.makespan(duration, hop, numpy.maximum)
    busy: list[Any] = [sum(n * duration[work] for work, n in rank.items()) for rank in path.ranks]
    whole, still, alone = makespan.reshape(3, count)
    work = functools.reduce(numpy.maximum, busy)[:count]
    return numpy.stack([whole, work, whole - still, whole - alone], axis=1)


def _duration(
    work: Work, rows: dict[str, ndarray], overlap: ndarray, smaller: Callable[..., Any]
) -> ndarray:
    """Seconds of an operation; in a fused slot one part computes while the other exchanges."""
    parts = [(_compute(kind, stage, rows), _exchange(kind, stage, rows)) for kind, stage in work]
    whole: Any = sum(compute + exchange for compute, exchange in parts)
    if len(parts) == 1:
        return whole
    (forward, dispatch), (backward, combine) = parts
    hidden = smaller(forward, combine) + smaller(backward, dispatch)
    return whole - overlap * hidden


def _compute(kind: Kind, stage: int, rows: dict[str, ndarray]) -> ndarray:
    if kind is Kind.B:
        return rows['input_grad'][stage] + rows['weight_grad'][stage]
    name = {Kind.F: 'forward', Kind.I: 'input_grad', Kind.W: 'weight_grad', Kind.R: 'recompute'}
    return rows[name[kind]][stage]


def _exchange(kind: Kind, stage: int, rows: dict[str, ndarray]) -> ndarray | float:
    if kind is Kind.F:
        return rows['exchange'][stage]
    # What is run again in the backward exchanges again.
    return rows['exchange'][stage] + rows['again'][stage] if kind in (Kind.I, Kind.B) else 0.0
