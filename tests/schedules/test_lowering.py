"""Where the passes put messages, rebuilding, reductions and gathers, and what they refuse."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mhc.schedules.catalog import SCHEDULES, forward_only, make_plan, obstacle
from megatron_mhc.schedules.lowering import (
    lower,
    place_communication,
    place_param_sync,
    place_recompute,
    place_reductions,
)
from megatron_mhc.schedules.plan import COMMUNICATION, Kind, Op, Plan, fuse
from megatron_mhc.schedules.validator import live_activations, problems

BACKWARD = (Kind.B, Kind.I)


def plan(*ranks, placement=((0, 1),), microbatches=2):
    ops = tuple(tuple(Op.parse(word) for word in rank.split()) for rank in ranks)
    return Plan('by-hand', microbatches, placement, ops)


def text(plan):
    return [' '.join(map(str, ops)) for ops in plan.ranks]


CASES = [
    (name, pp, m, chunks)
    for name in SCHEDULES
    for pp in range(1, 9)
    for m in range(1, 25)
    for chunks in ((2, 3, 4) if name == 'interleaved' else (2,))
    if obstacle(name, pp, m, chunks=chunks) is None
]


@st.composite
def made(draw):
    """Any schedule, or its evaluation, on its placement or on the reversed one."""
    name, pp, m, chunks = draw(st.sampled_from(CASES))
    found = make_plan(name, pp, m, chunks=chunks)
    if draw(st.integers(0, 4)) == 0 and found.directions == 1:
        found = forward_only(found.placement, m)
    return found.reversed_ranks() if draw(st.booleans()) else found


OPTIONS = st.fixed_dictionaries(
    {option: st.booleans() for option in ('recompute', 'reduce', 'param_sync')}
)


@settings(max_examples=150, deadline=None)
@given(made(), OPTIONS)
def test_every_lowered_plan_is_right(before, options):
    after = lower(before, **options)
    assert problems(after) == []
    assert live_activations(after) == live_activations(before)
    # Nothing that computes has moved.
    for old, new in zip(before.ranks, after.ranks, strict=True):
        assert old == tuple(op for op in new if op in set(old))
    kinds = {op.kind for _, _, op in after.leaves()}
    assert (Kind.R in kinds) == (options['recompute'] and not before.forward_only)
    assert (Kind.REDUCE in kinds) == (options['reduce'] and not before.forward_only)
    assert (Kind.PARAM_SYNC in kinds) == options['param_sync']


@settings(max_examples=60, deadline=None)
@given(made())
def test_a_message_leaves_at_once_and_is_expected_one_computation_ahead(before):
    for rank, ops in enumerate(place_communication(before).ranks):
        made_last, posted, awaited, computed = None, {}, [], 0
        for op in ops:
            name = op.payload, *op.key
            if op.kind is Kind.SEND:
                assert any(op.key == leaf.key for leaf in made_last.leaves), 'right after its maker'
            elif op.kind is Kind.RECV:
                posted[name] = computed
            elif op.kind is Kind.WAIT:
                # One computation between, unless there is none before.
                assert posted[name] == max(computed - 1, 0), (rank, op)
                awaited.append(op.key)
            else:
                assert all(key in [leaf.key for leaf in op.leaves] for key in awaited)
                made_last, awaited, computed = op, [], computed + 1


@settings(max_examples=40, deadline=None)
@given(made())
def test_rebuilding_runs_while_the_gradient_is_on_its_way(before):
    for ops in lower(before, recompute=True).ranks:
        for n, op in enumerate(ops):
            if op.kind is Kind.R:
                user = next(o for o in ops[n + 1 :] if o.kind is not Kind.WAIT)
                assert any(o.kind in BACKWARD and o.key == op.key for o in user.leaves)
                assert ops[n - 1].kind is not Kind.WAIT


def test_1f1b_word_for_word():
    assert text(lower(make_plan('1f1b', 2, 2), recompute=True, param_sync=True)) == [
        '0PARAM_SYNC 0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0R0 0WAIT_B0 0B0 0R1 0WAIT_B1 0B1 '
        '0REDUCE',
        '1RECV_F0 1PARAM_SYNC 1WAIT_F0 1F0 1RECV_F1 1R0 1B0 1SEND_B0 1WAIT_F1 1F1 1R1 1B1 '
        '1SEND_B1 1REDUCE',
    ]


def test_a_fused_slot_word_for_word():
    """What both parts need is awaited before the slot; what both give leaves after it."""
    before = make_plan('dualpipev-w', 2, 4)
    slot = next(op for op in before.ranks[0] if op.parts)
    forward, backward = slot.parts
    after = text(lower(before, recompute=True))[0]
    expected = f'{Op(Kind.R, *backward.key)} '
    for part, payload in ((forward, 'F'), (backward, 'B')):
        wait = Op(Kind.WAIT, *part.key, payload)
        expected += f'{wait} ' if before.peer(wait) == 1 else ''
    expected += str(slot)
    for part, payload in ((forward, 'F'), (backward, 'B')):
        send = Op(Kind.SEND, *part.key, payload)
        expected += f' {send}' if before.peer(send) == 1 else ''
    assert expected in after
    assert '(' in expected and 'R' in expected


def test_a_turn_crosses_no_link():
    """Rank 1 has stages 1 and 2: what goes from one to the other stays there."""
    after = lower(make_plan('zb-v', 2, 3))
    for _, _, op in after.leaves():
        if op.kind in COMMUNICATION:
            assert after.rank_of(op.stage) != after.peer(op)
    assert not any(
        op.kind in COMMUNICATION for _, _, op in lower(make_plan('dualpipev', 1, 4)).leaves()
    )


@settings(max_examples=40, deadline=None)
@given(made())
def test_a_stage_is_reduced_when_its_last_gradient_is_there_and_the_message_has_left(before):
    for ops in lower(before).ranks:
        for n, op in enumerate(ops):
            if op.kind is Kind.REDUCE:
                last = next(o for o in ops[n::-1] if o.kind not in (Kind.SEND, Kind.REDUCE))
                added = [leaf for leaf in last.leaves if leaf.kind in (Kind.B, Kind.W)]
                assert (op.stage, op.direction) in [(o.stage, o.direction) for o in added]
                assert ops[n + 1 : n + 2] == () or ops[n + 1].kind is not Kind.SEND


@pytest.mark.parametrize(
    'place, what',
    [
        (place_communication, 'messages'),
        (place_recompute, 'operations that rebuild'),
        (place_reductions, 'reductions'),
        (place_param_sync, 'parameter gathers'),
        (lower, 'messages'),
    ],
)
def test_a_pass_refuses_to_place_a_second_time(place, what):
    done = lower(make_plan('1f1b', 2, 2), recompute=True, param_sync=True)
    with pytest.raises(ValueError, match=f'plan 1f1b has {what} already: lower a plan of comp'):
        place(done)


def test_evaluation_gets_messages_and_gathers_only():
    before = forward_only(make_plan('zb-v', 2, 2).placement, 2)
    after = lower(before, recompute=True, param_sync=True)
    kinds = {op.kind for _, _, op in after.leaves()}
    assert kinds == {Kind.F, Kind.SEND, Kind.RECV, Kind.WAIT, Kind.PARAM_SYNC}
    assert all(op.payload in ('', 'F') for _, _, op in after.leaves())


@pytest.mark.parametrize('pp, m', [(2, 4), (4, 9)])
def test_dualpipev_w_is_dualpipev_with_split_slots(pp, m):
    slots = [op for ops in make_plan('dualpipev-w', pp, m).ranks for op in ops if op.parts]
    whole = [op for ops in make_plan('dualpipev', pp, m).ranks for op in ops if op.parts]
    assert slots == [fuse(op.parts[0], Op(Kind.I, *op.parts[1].key)) for op in whole]
