"""The simulator's clock on plans small enough to follow by hand."""

import pytest

from megatron_mhc.schedules.plan import Op, Plan
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.times import Times


def plan(*ranks, placement=None, microbatches=2, name='by hand'):
    """A plan from the notation, one string a rank."""
    ops = tuple(tuple(Op.parse(word) for word in rank.split()) for rank in ranks)
    placement = placement or (tuple(range(len(ranks))),)
    return Plan(name, microbatches, placement, ops)


def starts(timeline, lane='compute'):
    return {str(e.op): (e.start, e.end) for e in timeline.entries if e.lane == lane}


TWO = plan('0F0 0F1 0B0 0B1', '1F0 1B0 1F1 1B1')
V = ((0, 1, 1, 0),)


def test_each_operation_waits_for_its_rank_and_its_input():
    timeline = simulate(TWO)
    assert starts(timeline) == {
        **{'0F0': (0, 1), '0F1': (1, 2), '0B0': (4, 6), '0B1': (7, 9)},
        **{'1F0': (1, 2), '1B0': (2, 4), '1F1': (4, 5), '1B1': (5, 7)},
    }
    assert (timeline.makespan, timeline.work, timeline.bubble) == (9, 6, 3)
    assert timeline.bubble_share == pytest.approx(1 / 3)
    # Rank 1 starts late but never stops; rank 0 has gaps.
    assert timeline.span_bubbles == (3, 0) and timeline.span_bubble == 3
    assert timeline.peak_live == 2


def test_a_hop_delays_and_only_uncovered_hops_are_exposed():
    timeline = simulate(TWO, Times(hop=0.5))
    assert starts(timeline)['1F0'] == (1.5, 2.5)
    # 1F1 and 1B1 find their inputs there; rank 0 waits for both gradients.
    assert starts(timeline)['1B1'] == (5.5, 7.5)
    assert starts(timeline)['0B1'] == (8, 10)
    assert timeline.exposed_hops == (1.0, 0.5)
    hops = {str(e.op): (e.rank, e.start, e.end) for e in timeline.entries if e.lane == 'comm'}
    assert hops['1SEND_B0'] == (1, 4.5, 5.0)


def test_times_of_a_stage_are_its_share_of_the_rank():
    v = plan(*('0F0 3F0 3I0 3W0 0I0 0W0', '1F0 2F0 2I0 2W0 1I0 1W0'), placement=V, microbatches=1)
    times = Times(forward=2, input_grad=4, weight_grad=6, stage_scale=(1, 1, 1, 3))
    found = starts(simulate(v, times))
    assert found['0F0'] == (0, 1) and found['3F0'] == (3, 6)
    assert found['3I0'] == (6, 12) and found['3W0'] == (12, 21)
    # The two stages of rank 1 hand over without a hop.
    hopping = starts(simulate(v, Times(hop=10)))
    assert hopping['2F0'][0] == hopping['1F0'][1]
    with pytest.raises(ValueError, match='stage_scale has 2 factors, the plan 4 stages'):
        simulate(v, Times(stage_scale=(1, 1)))


def test_two_copies_of_a_model_share_the_rank_by_time_not_by_size():
    both = plan(
        "0F0 1F0' 1B0' 0B0", "0F0' 1F0 1B0 0B0'", placement=((0, 1), (1, 0)), microbatches=2
    )
    timeline = simulate(both)
    assert timeline.work == 6 and timeline.peak_live == 2


def test_a_fused_slot_is_atomic_unless_asked():
    slot = plan('0F0 (0F1;0B0)FUSE 0B1', '1F0 1B0 1F1 1B1')
    found = starts(simulate(slot, Times(fused_slot_factor=0.5)))
    # It starts with the later input, the gradient of microbatch 0, and its forward leaves at the
    # end: 1F1 waits for it.
    assert found['(0F1;0B0)FUSE'] == (4, 5.5)
    assert found['1F1'] == (5.5, 6.5)
    found = starts(simulate(slot, Times(atomic_slots=False)))
    assert found['0F1'] == (1, 2) and found['0B0'] == (4, 6) and found['1F1'] == (4, 5)
    found = starts(simulate(slot, Times(atomic_slots=False, fused_slot_factor=0.5)))
    assert found['0F1'] == (1, 1.5) and found['0B0'] == (4, 5) and found['0B1'] == (7, 9)


def test_recompute_is_part_of_the_backward_or_an_operation_of_its_own():
    times = Times(recompute=0.5, hop=1)
    inside = simulate(TWO, times)
    own = plan('0F0 0F1 0R0 0B0 0R1 0B1', '1F0 1B0 1F1 1R1 1B1')
    beside = simulate(own, times)
    assert inside.work == beside.work == 7
    # While the gradient is on its way, R runs.
    assert starts(inside)['0B0'] == (6.5, 9.0)
    assert starts(beside)['0B0'] == (6.5, 8.5)
    assert beside.makespan < inside.makespan


def test_a_high_priority_recompute_runs_beside_what_follows():
    ops = plan('0F0 0R0 0F1 0B0 0R1 0B1')
    one = simulate(ops, Times(recompute=2))
    two = simulate(ops, Times(recompute=2, recompute_stream='high'))
    assert one.makespan == 10 and one.work == 10
    assert starts(two, 'high') == {'0R0': (1, 3), '0R1': (5, 7)}
    # 0B0 waits for 0R0, which 0F1 hides half of.
    assert starts(two)['0F1'] == (1, 2) and starts(two)['0B0'] == (3, 5)
    assert two.makespan == 9 and two.work == 6


def test_recomputes_of_a_rank_do_not_run_at_once():
    ops = plan('0F0 0F1 0R0 0R1 0B0 0B1')
    timeline = simulate(ops, Times(recompute=2, recompute_stream='high'))
    assert starts(timeline, 'high') == {'0R0': (2, 4), '0R1': (4, 6)}


def test_an_activation_lives_until_its_weight_gradient():
    split = '0F0 0I0 0F1 0W0 0I1 0F2 0I2 0W1 0W2'
    assert simulate(plan(split, microbatches=3)).peak_live == 2


LOWERED = plan(
    '0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0WAIT_B0 0B0 0RECV_B1 0WAIT_B1 0B1 0REDUCE',
    '1RECV_F0 1WAIT_F0 1F0 1B0 1SEND_B0 1RECV_F1 1WAIT_F1 1F1 1B1 1SEND_B1 1REDUCE',
)


def test_a_lowered_plan_is_timed_by_its_communication():
    timeline = simulate(LOWERED, Times(hop=0.5))
    # 0F1 is ready at 2, but rank 1 posts its receive only after 1B0.
    assert starts(timeline, 'comm')['0SEND_F1'] == (4.5, 5.0)
    assert starts(timeline)['1F1'] == (5.0, 6.0)
    # The SEND of 1B0 stands before that RECV and leaves at once.
    assert starts(timeline, 'comm')['1SEND_B0'] == (4.5, 5.0)
    assert timeline.exposed_hops == (1.0, 1.0)


def test_a_send_leaves_when_its_turn_comes():
    late = '1RECV_F0 1WAIT_F0 1F0 1B0 1RECV_F1 1WAIT_F1 1F1 1SEND_B0 1B1 1SEND_B1 1REDUCE'
    ranks = (LOWERED.ranks[0], plan(late).ranks[0])
    found = starts(simulate(LOWERED.with_ranks(ranks)))
    assert found['0B0'] == (5, 7)


def test_the_step_ends_with_the_last_reduction():
    timeline = simulate(LOWERED, Times(reduce=3))
    assert starts(timeline, 'comm')['0REDUCE'] == (9, 12)
    assert (timeline.makespan, timeline.work) == (12, 6)


def test_a_forward_waits_for_its_parameters():
    ops = plan('0PARAM_SYNC 0F0 0B0', '1PARAM_SYNC 1F0 1B0', microbatches=1)
    assert starts(simulate(ops, Times(param_sync=2)))['0F0'] == (2, 3)


def test_contention_sends_one_tensor_at_a_time():
    # Both activations are made within one hop.
    times = {'forward': 0.2, 'hop': 1.0}
    free = starts(simulate(plan('0F0 0F1', '1F0 1F1'), Times(**times)), 'comm')
    assert free == {'0SEND_F0': (0.2, 1.2), '0SEND_F1': (0.4, 1.4)}
    one = Times(**times, link_contention=True)
    busy = starts(simulate(plan('0F0 0F1', '1F0 1F1'), one), 'comm')
    assert busy == {'0SEND_F0': (0.2, 1.2), '0SEND_F1': (1.2, 2.2)}


def test_a_plan_that_cannot_proceed_names_rank_operation_and_cause():
    crossed = plan('0F0 0B0 0F1 0B1', '1F1 1B1 1F0 1B0')
    with pytest.raises(ValueError) as caught:
        simulate(crossed)
    text = str(caught.value)
    assert 'rank 0 at 0B0 waits for 1I0 of rank 1' in text
    assert 'rank 1 at 1F1 waits for 0F1 of rank 0' in text
    assert '\n' not in text


@pytest.mark.parametrize(
    'ops, text',
    [('0F0 0W0 0I0', '0W0 waits for 0I0'), ('0B0 0F0', '0B0 waits for 0F0')]
    + [('0R0 0F0 0B0', '0R0 waits for 0F0'), ('0F0 0B0 0R0', '0B0 waits for 0R0')],
)
def test_a_rank_that_waits_for_itself_is_named(ops, text):
    with pytest.raises(ValueError, match=f'rank 0 at {text} of rank 0'):
        simulate(plan(ops, microbatches=1))


@pytest.mark.parametrize(
    'rank, old, new, text',
    [
        (1, '1RECV_F0 ', '', 'rank 1 at 1WAIT_F0 waits for 1RECV_F0 before it'),
        (1, '1WAIT_F0 ', '', 'rank 1 at 1F0 waits for 1WAIT_F0 before it'),
        (0, '0SEND_F0 ', '', 'rank 1 at 1WAIT_F0 waits for 0SEND_F0 of rank 0'),
        (0, '0F0 0SEND_F0', '0SEND_F0 0F0', 'rank 0 at 0SEND_F0 waits for 0F0 of rank 0'),
    ],
)
def test_missing_communication_is_named(rank, old, new, text):
    words = ' '.join(map(str, LOWERED.ranks[rank]))
    ranks = list(LOWERED.ranks)
    ranks[rank] = plan(words.replace(old, new)).ranks[0]
    with pytest.raises(ValueError, match='cannot proceed: .*validate the plan') as caught:
        simulate(LOWERED.with_ranks(tuple(ranks)))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    'wrong, text',
    [
        ({'forward': 0}, 'forward=0: everything is measured'),
        ({'hop': -1}, 'hop=-1: a time'),
        ({'weight_grad': float('nan')}, 'weight_grad=nan: a time'),
        ({'fused_slot_factor': 0}, 'fused_slot_factor=0'),
        ({'recompute_stream': 'low'}, "recompute_stream='low'; take one of"),
        ({'stage_scale': (1, 0)}, 'stage_scale=0: a factor'),
    ],
)
def test_impossible_times_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        Times(**wrong)


def test_forward_only_holds_nothing():
    assert simulate(plan('0F0 0F1', '1F0 1F1')).peak_live == 1
