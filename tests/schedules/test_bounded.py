"""Schedules for less memory: what they hold, what they cost, and that a bound is kept."""

import functools
from fractions import Fraction

import pytest

from megatron_mhc.schedules import building_block
from megatron_mhc.schedules.catalog import make_plan, obstacle
from megatron_mhc.schedules.generate_bounded import bound_obstacle
from megatron_mhc.schedules.live import live_at_peak
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.times import Times
from megatron_mhc.schedules.validator import live_activations, validate

NAMES = ('v-half', 'v-min', 'v-bound')
make_plan = functools.cache(make_plan)


def bubble(name, pp, m=None, **bound):
    return simulate(make_plan(name, pp, m or 3 * pp, **bound)).bubble


@pytest.mark.parametrize('pp', [1, 2, 3, 6, 7, 10])
def test_they_hold_what_the_paper_says(pp):
    """arXiv 2405.15362 and its authors' table: (p + 2) // 2 and (p + 4) // 3 microbatches."""
    peaks = {name: max(live_activations(make_plan(name, pp, 4 * pp))) for name in NAMES}
    assert peaks['v-half'] == (pp + 2) // 2
    assert peaks['v-min'] == (pp + 4) // 3
    assert peaks['v-bound'] <= peaks['v-half']


# P -> bubble in whole forward passes of a rank, makespan, F = I = W; by microbatches in flight.
BUBBLES = {
    4: {'v-min': (2, 5.5), 'v-half': (3, 4.5), 2: 5.5, 3: 3.5, 3.5: 2.5, 4: 1.5},
    8: {'v-min': (4, 13.5), 'v-half': (5, 11), 4: 13.5, 5: 10.5, 6: 8.5, 7: 6.5, 8: 3.5},
    16: {'v-min': (6, 29.5), 'v-half': (9, 24), 6: 29.5, 9: 24, 12: 19.5, 14: 14.5, 16: 7.5},
}


@pytest.mark.parametrize('pp', BUBBLES)
def test_bubble_against_memory(pp):
    for name, wanted in BUBBLES[pp].items():
        if isinstance(name, str):
            held = max(live_activations(make_plan(name, pp, 4 * pp)))
            assert (held, bubble(name, pp)) == wanted, name
        else:
            assert bubble('v-bound', pp, live_bound=name) == wanted, name
    # The authors' table says about 2 p / 3 and p / 2 of F + B + W; with all memory, ZB-V's.
    assert bubble('v-min', pp) <= 3 * Fraction(2 * pp, 3)
    assert bubble('v-half', pp) <= 3 * Fraction(pp, 2)
    assert bubble('v-bound', pp, live_bound=pp) == bubble('zb-v', pp) == (pp - 1) / 2


@pytest.mark.parametrize('pp', [3, 8])
def test_a_bound_is_kept_and_more_memory_never_costs_time(pp):
    before = None
    for doubled in range(2, 2 * pp + 3):
        bound = doubled / 2
        reason = obstacle('v-bound', pp, 2 * pp, live_bound=bound)
        if reason is not None:
            # Only below the least there is.
            assert before is None and f'at most {bound:g} microbatches' in reason
            continue
        plan = make_plan('v-bound', pp, 2 * pp, live_bound=bound)
        validate(plan, live_bound=bound)
        validate(lower(plan).reversed_ranks(), live_bound=bound)
        took = simulate(plan).makespan
        assert before is None or took <= before
        before = took
    assert bound_obstacle(pp, (pp + 4) // 3) is None


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('pp', [1, 4, 6])
def test_the_end_of_a_long_step_is_that_of_a_shorter_one(name, pp, monkeypatch):
    def plans():
        return [make_plan.__wrapped__(name, pp, m) for m in (1, pp, 12 * pp)]

    got = plans()
    # As if every step were followed singly.
    monkeypatch.setattr(building_block, '_settled', lambda grains, pp: 10**6)
    assert got == plans()


def test_rank_by_rank_is_the_whole(pp=5, m=17):
    for name in NAMES:
        whole = make_plan(name, pp, m)
        parts = [make_plan.__wrapped__(name, pp, m, only=(rank,)) for rank in range(pp)]
        assert tuple(part.ranks[rank] for rank, part in enumerate(parts)) == whole.ranks


UNEQUAL = Times(forward=1, input_grad=1.25, weight_grad=0.75)


@pytest.mark.parametrize(
    'times, v_min', [(Times(), 3), (Times(hop=0.1), 3.4), (Times(hop=0.25), 4), (UNEQUAL, 3.75)]
)
def test_what_one_more_microbatch_costs(times, v_min):
    """Its work of 3; but under v-min every operation waits for the one that has just ended."""
    for name in NAMES:
        steps = [simulate(make_plan(name, 4, m), times).makespan for m in (16, 32)]
        assert (steps[1] - steps[0]) / 16 == pytest.approx(v_min if name == 'v-min' else 3), name


@pytest.mark.parametrize(
    'name, bound, words',
    [
        ('v-bound', 3, 'holds at most 3 microbatches in flight on 8 ranks, as one needs 4 '),
        ('zb-v', 5, 'a bound of 5 has no effect with zb-v: use v-bound, or drop it'),
    ],
)
def test_bounds_that_do_not_exist(name, bound, words):
    for refused in (make_plan, live_at_peak):
        numbers = {'chunks': 2} if refused is live_at_peak else {}
        with pytest.raises(ValueError, match=words):
            refused(name, 8, 16, live_bound=bound, **numbers)


def test_the_default_bound_is_that_of_v_half():
    assert make_plan('v-bound', 8, 40).ranks == make_plan('v-bound', 8, 40, live_bound=5).ranks
    assert max(live_at_peak('v-bound', 8, 40, 2, 6.5)) == 6


def test_a_block_whose_operations_coincide_is_refused():
    with pytest.raises(ValueError, match='two operations of a rank coincide'):
        building_block.operations(building_block.Block((1, 1, 1, 1), (1, 1, 1)), 0, 3, 4)
