"""What the validator finds, how it says it, how long it takes, and what it counts as live."""

import sys

import pytest

from megatron_mhc.schedules.catalog import SCHEDULES, forward_only, make_plan
from megatron_mhc.schedules.lowering import lower, place_communication
from megatron_mhc.schedules.plan import Kind, Op, Plan
from megatron_mhc.schedules.validator import PlanError, live_activations, problems, validate

LINE, V = ((0, 1),), ((0, 1, 1, 0),)


def plan(*ranks, placement=LINE, microbatches=2):
    ops = tuple(tuple(Op.parse(word) for word in rank.split()) for rank in ranks)
    return Plan('by-hand', microbatches, placement, ops)


# Two stages, two microbatches: computations, and with everything.
COMPUTE = plan('0F0 0F1 0B0 0B1', '1F0 1B0 1F1 1B1')
SPLIT = plan('0F0 0F1 0I0 0I1 0W0 0W1', '1F0 1I0 1W0 1F1 1B1')
WHOLE = lower(COMPUTE, recompute=True, param_sync=True)


def changed(before, *changes):
    """``before`` with words changed: (rank, old words, new words)."""
    ranks = [' '.join(map(str, ops)) for ops in before.ranks]
    for rank, old, new in changes:
        assert ranks[rank].count(old) == 1, (ranks[rank], old)
        ranks[rank] = ranks[rank].replace(old, new)
    return plan(*ranks, placement=before.placement, microbatches=before.microbatches)


def test_plans_by_hand_are_right():
    for right in (COMPUTE, SPLIT, WHOLE, lower(SPLIT), place_communication(COMPUTE)):
        assert problems(right) == []
        validate(right)
        validate(right.reversed_ranks())


@pytest.mark.parametrize(
    'before, changes, finding',
    [
        # Operations that mean nothing.
        (COMPUTE, [(0, '0B1', '1B1')], 'rank 0, operation 3, 1B1: that stage is on rank 1'),
        (COMPUTE, [(0, '0B1', '2B1')], 'rank 0, operation 3, 2B1: there is no such stage'),
        (COMPUTE, [(0, '0B1', "0B1'")], "rank 0, operation 3, 0B1': there is no such stage"),
        (COMPUTE, [(0, '0B1', '0B2')], 'rank 0, operation 3, 0B2: there is no such microbatch'),
        (WHOLE, [(1, '1SEND_B0', '1SEND_F0')], '1SEND_F0: no other rank is at the other end'),
        # Every pass once.
        (COMPUTE, [(1, '1F1 ', '')], 'rank 1, 1F1: missing'),
        (COMPUTE, [(1, ' 1B1', '')], 'rank 1, 1B1: missing, and I and W in its place too'),
        (COMPUTE, [(0, '0F1', '0F1 0F1')], 'rank 0, operation 2, 0F1: stands there a second time'),
        (COMPUTE, [(0, '0B1', '0B1 0I1')], 'rank 0, 0I1: B of the same microbatch does its work'),
        (SPLIT, [(0, ' 0W1', '')], 'rank 0, 0W1: missing, though its I leaves'),
        (COMPUTE, [(0, '0B1', '0B1 0W1')], 'rank 0, 0W1: there is no I that leaves'),
        # Order on the rank.
        (COMPUTE, [(1, '1F1 1B1', '1B1 1F1')], 'rank 1, 1B1: stands before its F'),
        (SPLIT, [(1, '1F0 1I0', '1I0 1F0')], 'rank 1, 1I0: stands before its F'),
        (SPLIT, [(1, '1I0 1W0', '1W0 1I0')], 'rank 1, 1W0: stands before its I'),
        (SPLIT, [(0, '0W0 0W1', '0W1 0W0')], 'rank 0, 0W0: stands after 0W1; gradients of a stage'),
        (SPLIT, [(0, '0I0 0I1', '0I1 0I0')], 'rank 0, 0I0: stands after 0I1; gradients of a stage'),
        (COMPUTE, [(0, '0B0 0B1', '0B1 0B0')], 'rank 0, 0B0: stands after 0B1; gradients'),
        # Fused slots.
        (COMPUTE, [(1, '1F0 1B0', '(1F0;1B0)FUSE')], '(1F0;1B0)FUSE: its backward needs its'),
        # R.
        (WHOLE, [(1, '1R0 ', '')], 'rank 1, 1R0: missing, though others are rebuilt'),
        (WHOLE, [(1, '1F0', ''), (1, '1R0', '1R0 1F0')], 'rank 1, 1R0: stands before its F'),
        (WHOLE, [(1, '1R1 1B1', '1B1 1R1')], 'rank 1, 1R1: stands after the backward that needs'),
        # Collectives.
        (WHOLE, [(0, ' 0REDUCE', '')], 'rank 0, 0REDUCE: missing, though other stages have it'),
        (WHOLE, [(0, '0B1 0REDUCE', '0REDUCE 0B1')], '0REDUCE: stands before 0B1, which adds'),
        (WHOLE, [(0, '0PARAM_SYNC ', '')], 'rank 0, 0PARAM_SYNC: missing'),
        (WHOLE, [(0, '0PARAM_SYNC 0F0', '0F0 0PARAM_SYNC')], '0PARAM_SYNC: stands after 0F0'),
        # Messages.
        (WHOLE, [(0, '0SEND_F1 ', '')], 'rank 0, 0SEND_F1 to rank 1: missing'),
        (WHOLE, [(1, '1RECV_F1 ', '')], 'rank 1, 1RECV_F1 from rank 0: missing'),
        (WHOLE, [(1, '1WAIT_F1 ', '')], 'rank 1, 1WAIT_F1 for rank 0: missing'),
        (WHOLE, [(0, '0F1 0SEND_F1', '0SEND_F1 0F1')], '0SEND_F1 to rank 1: stands before its'),
        (WHOLE, [(1, '1WAIT_F1 1F1', '1F1 1WAIT_F1')], '1WAIT_F1 for rank 0: stands after its'),
        (
            WHOLE,
            [(0, '0RECV_B1 ', ''), (0, '0WAIT_B1', '0WAIT_B1 0RECV_B1')],
            'rank 0, 0WAIT_B1 for rank 1: stands before its RECV',
        ),
    ],
)
def test_a_finding_names_rank_operation_and_fault(before, changes, finding):
    found = problems(changed(before, *changes))
    assert any(finding in line for line in found), found
    assert not any('for ever' in line for line in found)


def test_what_a_plan_without_backward_may_not_have():
    evaluation = plan('0F0 0SEND_F0', '1RECV_F0 1WAIT_F0 1F0', microbatches=1)
    assert problems(evaluation) == []
    for word in ('0W0', '0R0', '0REDUCE', '0RECV_B0'):
        found = problems(changed(evaluation, (0, '0F0', f'0F0 {word}')))
        assert found == [f'rank 0, operation 1, {word}: the plan has no backward']


@pytest.mark.parametrize(
    'op, finding',
    [
        (Op(Kind.FUSE, 0), 'a fused slot has an F, then a B or I'),
        (Op(Kind.FUSE, 0, parts=(Op(Kind.B, 0, 0), Op(Kind.F, 0, 1))), 'a fused slot has an F'),
        (Op(Kind.F, 0, 1, parts=(Op(Kind.F, 0, 1),)), 'only a fused slot has parts'),
        (Op(Kind.SEND, 0, 1), 'it carries neither'),
        (Op(Kind.B, 0, 1, payload='B'), 'only messages carry something'),
        (Op(Kind.REDUCE, 0, 1), 'it is of a whole step'),
    ],
)
def test_operations_that_no_text_gives(op, finding):
    ranks = (COMPUTE.ranks[0][:-1] + (op,), COMPUTE.ranks[1])
    assert finding in problems(COMPUTE.with_ranks(ranks))[0]


@pytest.mark.parametrize(
    'placement, microbatches, finding',
    [
        (((0, 2),), 2, 'stage 1 is placed on rank 2: there is no such rank'),
        (((0, 1), (1,)), 2, 'copy 1 of the model has 1 stages, not as copy 0'),
        (((0, 1),), 0, '0 microbatches are too few'),
    ],
)
def test_plans_that_cannot_be(placement, microbatches, finding):
    assert finding in problems(Plan('by-hand', microbatches, placement, COMPUTE.ranks))[0]


# Nothing is missing and every rank's own order is right.
def test_ranks_that_wait_for_each_other():
    hang = plan('0F0 0B0 0F1 0B1', '1F0 1F1 1B0 1B1')
    assert problems(hang) == [
        'rank 0, operation 1, 0B0: waits for ever for 1B0 of rank 1',
        'rank 1, operation 1, 1F1: waits for ever for 0F1 of rank 0',
    ]
    assert problems(place_communication(hang)) == [
        'rank 0, operation 3, 0WAIT_B0: waits for ever for 1SEND_B0 of rank 1',
        'rank 1, operation 4, 1WAIT_F1: waits for ever for 0SEND_F1 of rank 0',
    ]


def test_a_slot_that_needs_itself_through_another_rank():
    hang = plan('0F0 (0F1;0B0)FUSE 0B1', '1F0 1F1 1B0 1B1')
    assert problems(hang) == [
        'rank 0, operation 1, (0F1;0B0)FUSE: waits for ever for 1B0 of rank 1',
        'rank 1, operation 1, 1F1: waits for ever for 0F1 of rank 0',
    ]
    assert problems(plan('0F0 (0F1;0B0)FUSE 0B1', '1F0 1B0 1F1 1B1')) == []


def test_a_slot_of_two_model_copies():
    """Microbatch 0 of one copy is not microbatch 0 of the other."""
    copies = ((0, 1), (1, 0))
    ranks = "1F0' (0F0;1B0')FUSE 0B0", "0F0' 1F0 0B0' 1B0"
    assert problems(lower(plan(*ranks, placement=copies))) == []


def test_a_turn_on_one_rank_needs_the_right_order_too():
    turn = lower(plan('0F0 3F0 3B0 0B0', '1F0 2F0 2B0 1B0', placement=V, microbatches=1))
    assert problems(turn) == []
    hang = changed(turn, (1, '1F0 2RECV_B0 2F0 2SEND_F0', '2RECV_B0 2F0 2SEND_F0 1F0'))
    assert 'rank 1, operation 3, 2F0: waits for ever for 1F0 of rank 1' in problems(hang)


def test_a_channel_holds_one_message():
    """The third activation leaves rank 0 when rank 1 has asked for the second."""
    deep = '0F0 0F1 0F2 3F0 3B0 0B0 3F1 3B1 0B1 3F2 3B2 0B2'
    one_by_one = '1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1 1F2 2F2 2B2 1B2'
    computations = plan(deep, one_by_one, placement=V, microbatches=3)
    assert problems(computations) == []
    hang = place_communication(computations)
    assert problems(hang) == [
        'rank 0, operation 6, 0SEND_F2: waits for ever for rank 1 to post the receive of message 1',
        'rank 1, operation 6, 2WAIT_B0: waits for ever for 3SEND_B0 of rank 0',
    ]
    early = changed(hang, (1, '1RECV_F1 ', ''), (1, '1WAIT_F0', '1WAIT_F0 1RECV_F1'))
    assert problems(early) == []


def test_both_ends_of_a_channel_have_one_order():
    crossed = changed(
        place_communication(plan('0F0 0F1', '1F0 1F1')),
        (1, '1RECV_F0 1RECV_F1', '1RECV_F1 1RECV_F0'),
    )
    assert problems(crossed) == [
        'rank 0, 0SEND_F0 to rank 1: is message 0 of its channel, but the other end receives '
        '1RECV_F1 as that'
    ]


def test_an_error_is_one_line_with_the_first_findings():
    with pytest.raises(PlanError) as caught:
        validate(plan('0F0', '1B1'))
    text = str(caught.value)
    assert isinstance(caught.value, ValueError) and '\n' not in text
    assert text.startswith('plan by-hand for 2 ranks and 2 microbatches is invalid: rank 0, 0B0: ')
    assert text.count(';') == 2 and text.endswith(' (and 3 more)')


# In whole forward passes of a rank; arXiv 2401.10241 and DeepSeek's DualPipe say the same.
@pytest.mark.parametrize('pp', [4, 8, 16])
def test_live_activations(pp):
    def peaks(name):
        return live_activations(make_plan(name, pp, 4 * pp))

    falling = tuple(float(pp - rank) for rank in range(pp))
    assert peaks('gpipe') == (4 * pp,) * pp
    assert peaks('1f1b') == falling == peaks('1f1b-overlap')
    assert peaks('interleaved')[0] == 1.5 * pp - 0.5
    assert set(peaks('zb-h1')) == {pp} == set(peaks('zb-v'))
    assert set(peaks('dualpipev')) == {pp + 0.5} == set(peaks('dualpipev-w'))
    assert set(peaks('dualpipe')) == {pp + 1}
    assert set(peaks('forward-only')) == {1}
    for name in ('dualpipev', 'zb-h1', '1f1b'):
        assert live_activations(lower(make_plan(name, pp, 4 * pp), recompute=True)) == peaks(name)


def test_a_bound_on_live_activations():
    bounded = make_plan('dualpipev', 4, 12)
    assert problems(bounded, live_bound=4.5) == []
    assert problems(bounded, live_bound=4) == [
        f'rank {rank} holds 4.5 activations at once, more than 4' for rank in range(4)
    ]
    with pytest.raises(PlanError, match='rank 2 holds 8 activations at once, more than 4'):
        validate(make_plan('gpipe', 4, 8), live_bound=4)


def test_evaluation_keeps_nothing():
    assert live_activations(forward_only(V, 8)) == (0.5, 0.5)


@pytest.mark.parametrize('name', sorted(SCHEDULES))
def test_proving_a_large_plan_asks_each_operation_once(name):
    """A call of a Python function takes as long as all that is to be done for an operation."""
    large = lower(make_plan(name, 16, 256), recompute=name != 'forward-only')
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == 'call'

    sys.setprofile(count)
    try:
        found = problems(large)
    finally:
        sys.setprofile(None)
    assert found == [] and calls < 2 * sum(map(len, large.ranks))


def test_ranks_can_be_looked_at_by_themselves():
    """With their own operations only; what is wrong elsewhere is not theirs to find."""
    whole = lower(make_plan('dualpipev', 6, 12))
    seen = range(1, 4)
    part = whole.with_ranks(tuple(ops if r in seen else () for r, ops in enumerate(whole.ranks)))
    assert problems(part, ranks=seen) == []
    assert problems(part) and problems(part, ranks=range(5))
    for rank in seen:
        ops = part.ranks[rank]
        for lacking in (ops[:4] + ops[5:], ops[:-3] + ops[-2:]):
            ranks = (*part.ranks[:rank], lacking, *part.ranks[rank + 1 :])
            assert problems(part.with_ranks(ranks), ranks=seen)
    # Both ends of a channel are among them: its order is checked.
    ops = list(part.ranks[2])
    first, second = [n for n, op in enumerate(ops) if op.kind is Kind.RECV and op.payload == 'F'][
        :2
    ]
    ops[first], ops[second] = ops[second], ops[first]
    crossed = part.with_ranks((*part.ranks[:2], tuple(ops), *part.ranks[3:]))
    assert any('is message 0 of its channel' in line for line in problems(crossed, ranks=seen))
