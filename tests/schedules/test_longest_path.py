"""The longest path through a plan is the step that the simulator finds."""

from __future__ import annotations

import random

import numpy
import pytest

from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.longest_path import walk
from megatron_mhc.schedules.lowering import lower, place_recompute
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.times import Times, durations

PLANS = [
    ('gpipe', 1),
    ('1f1b', 1),
    ('1f1b-overlap', 1),
    ('zb-h1', 1),
    ('interleaved', 2),
    ('interleaved', 3),
]
PLANS += [('zb-v', 2), ('dualpipev', 2), ('dualpipev-w', 2), ('dualpipe', 2)]


def random_times(draw: random.Random, stages: int, **fixed) -> Times:
    names = ('forward', 'input_grad', 'weight_grad', 'recompute', 'hop', 'fused_slot_factor')
    times = {name: draw.uniform(0.1, 2) for name in names} | fixed
    return Times(**times, stage_scale=tuple(draw.uniform(0.3, 3) for _ in range(stages)))


def work_times(plan, times):
    duration = durations(plan, times)
    return {
        tuple((leaf.kind, leaf.stage) for leaf in op.leaves): duration(op)
        for ops in plan.ranks
        for op in ops
    }


@pytest.mark.parametrize('rebuilt', [False, True])
@pytest.mark.parametrize('name, chunks', PLANS)
def test_it_is_the_simulated_step(name, chunks, rebuilt, random_seed):
    draw = random.Random(random_seed)
    for pp in (2, 4, 6):
        plan = make_plan(name, pp, pp * draw.choice((2, 4)), chunks=chunks)
        plan = place_recompute(plan) if rebuilt else plan
        times = random_times(draw, plan.stages)
        path, duration = walk(plan), work_times(plan, times)
        timeline = simulate(plan, times)
        assert path.makespan(duration, times.hop) == pytest.approx(timeline.makespan)
        busy = [sum(n * duration[work] for work, n in rank.items()) for rank in path.ranks]
        assert busy == pytest.approx(timeline.busy)


def test_many_times_at_once(random_seed):
    draw = random.Random(random_seed)
    plan = make_plan('dualpipev-w', 4, 12)
    cases = [random_times(draw, plan.stages) for _ in range(5)]
    tables = [work_times(plan, times) for times in cases]
    duration = {work: numpy.array([table[work] for table in tables]) for work in tables[0]}
    hop = numpy.array([times.hop for times in cases])
    found = walk(plan).makespan(duration, hop, numpy.maximum)
    assert found == pytest.approx([simulate(plan, times).makespan for times in cases])


def test_plans_with_messages_and_plans_that_hang_are_refused():
    plan = make_plan('1f1b', 2, 2)
    with pytest.raises(ValueError, match='before lowering'):
        walk(lower(plan))
    wrong = plan.with_ranks((plan.ranks[0][::-1], plan.ranks[1]))
    with pytest.raises(ValueError, match='plan 1f1b cannot proceed'):
        walk(wrong)
