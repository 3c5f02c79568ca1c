"""What each schedule does, in which order, and where it is refused; torch's plans as oracle."""

from collections import Counter

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megatron_mhc.schedules.catalog import SCHEDULES, forward_only, make_plan, obstacle
from megatron_mhc.schedules.lowering import place_communication
from megatron_mhc.schedules.plan import Kind, Op, fuse
from megatron_mhc.schedules.plan_text import read_plan
from megatron_mhc.schedules.validator import problems, validate

NUMBERS = [(pp, m) for pp in (1, 2, 3, 4, 6, 8) for m in (1, 2, 3, 4, 6, 8, 11, 12, 16, 20)]
V = ('zb-v', 'v-half', 'v-min', 'v-bound', 'dualpipev', 'dualpipev-w')


def plans(name):
    """A schedule at every (pp, m) for which it exists."""
    return [make_plan(name, pp, m) for pp, m in NUMBERS if obstacle(name, pp, m) is None]


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_every_pass_is_there_once(name):
    whole = {Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W}
    for plan in plans(name):
        assert plan.schedule == name
        leaves = [op for _, _, op in plan.leaves()]
        kinds: dict = {}
        for op in leaves:
            kinds.setdefault(op.key, []).append(op.kind)
        assert set(kinds) == {
            (stage, mb, direction)
            for direction in range(plan.directions)
            for stage in range(plan.stages)
            for mb in range(plan.microbatches // plan.directions)
        }
        allowed = ({Kind.F},) if name == 'forward-only' else whole
        assert all(
            set(found) in allowed and len(set(found)) == len(found) for found in kinds.values()
        )
        assert any(op.kind is Kind.W for op in leaves) == name.startswith(
            ('1f1b-overlap', 'zb', 'v-', 'dualpipe')
        )


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_gradients_of_a_stage_are_added_in_ascending_order(name):
    """Its sums are then those of one process, bit for bit."""
    for plan in plans(name):
        added: dict = {}
        for _, _, op in plan.leaves():
            if op.kind in (Kind.B, Kind.W):
                added.setdefault((op.stage, op.direction), []).append(op.microbatch)
        assert all(found == sorted(found) for found in added.values())


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_every_plan_can_run(name):
    for plan in plans(name):
        validate(plan)
        validate(plan.reversed_ranks())


def test_placements():
    assert make_plan('1f1b', 3, 3).placement == ((0, 1, 2),)
    assert make_plan('interleaved', 2, 2, chunks=3).placement == ((0, 1, 0, 1, 0, 1),)
    assert make_plan('dualpipe', 4, 8).placement == ((0, 1, 2, 3), (3, 2, 1, 0))
    for name in V:
        plan = make_plan(name, 3, 6)
        assert plan.placement == ((0, 1, 2, 2, 1, 0),)
        assert plan.reversed_ranks().placement == ((2, 1, 0, 0, 1, 2),)
    for schedule in SCHEDULES.values():
        chunks = schedule.chunks or 3
        plan = make_plan(schedule.name, 2, 4, chunks=chunks)
        assert {len(held) for held in plan.chunks} == {chunks}, schedule.name


# torch as oracle. A schedule object without its stages is enough for the order.
def torch_actions(name, pp, m, chunks=1):
    """torch's plan in its own words, a list for each rank."""
    oracle = object.__new__(getattr(torch_schedules, name))
    vars(oracle).update(
        pp_group_size=pp,
        num_stages=pp * chunks,
        _num_stages=pp * chunks,
        n_local_stages=chunks,
        _n_microbatches=m,
        microbatches_per_round=pp,
        stage_index_to_group_rank={
            stage: min(stage, 2 * pp - 1 - stage) for stage in range(2 * pp)
        },
    )
    if hasattr(oracle, '_calculate_single_rank_operations'):
        return [oracle._calculate_single_rank_operations(rank) for rank in range(pp)]
    order = oracle._get_pipeline_order()
    return [order[rank] for rank in range(pp)]


def torch_ranks(name, pp, m, chunks=1):
    """The same in ours, without the slots that it leaves empty and without reductions."""
    return tuple(
        tuple(torch_op(a) for a in actions if a is not None and 'REDUCE' not in str(a))
        for actions in torch_actions(name, pp, m, chunks)
    )


def torch_op(action):
    if action.sub_actions:
        return fuse(*map(torch_op, action.sub_actions))
    return Op(Kind(action.computation_type.value), action.stage_index, action.microbatch_index)


@pytest.mark.parametrize('pp', [1, 2, 3, 4, 8])
def test_same_as_torch(pp):
    for m in (1, pp, pp + 1, 2 * pp, 5 * pp):
        assert make_plan('gpipe', pp, m).ranks == torch_ranks('ScheduleGPipe', pp, m)
    for m in (1, pp, 2 * pp - 1, 2 * pp, 2 * pp + 1, 5 * pp):
        assert make_plan('zb-v', pp, m).ranks == torch_ranks('ScheduleZBVZeroBubble', pp, m, 2)
    for m in (2 * pp, 2 * pp + 1, 3 * pp, 5 * pp):
        assert make_plan('dualpipev', pp, m).ranks == torch_ranks('ScheduleDualPipeV', pp, m, 2)
    for m in (pp, 2 * pp, 5 * pp):
        for chunks in (2, 3, 4):
            plan = make_plan('interleaved', pp, m, chunks=chunks)
            assert plan.ranks == torch_ranks('ScheduleInterleaved1F1B', pp, m, chunks)
    for m in (pp, pp + 3, 4 * pp):
        *ranks, last = make_plan('1f1b', pp, m).ranks
        # torch 2.15 numbers the forward passes of the last rank from 1.
        assert tuple(ranks) == torch_ranks('Schedule1F1B', pp, m)[:-1]
        assert last == tuple(Op(kind, pp - 1, mb) for mb in range(m) for kind in (Kind.F, Kind.B))


def kinds_by_chunk(plan, rank):
    """How often each operation is on a rank; by chunk, 0 the one whose microbatches come first."""
    first = plan.ranks[rank][0]

    def chunk(op):
        return int((op.stage, op.direction) != (first.stage, first.direction))

    return Counter(
        '&'.join(f'{leaf.kind}{chunk(leaf)}' for leaf in op.leaves) for op in plan.ranks[rank]
    )


def eight_steps(pp, m, rank):
    """DualPipe's counts, step by step (DeepSeek's repository)."""
    ahead, last = pp - rank - 1, rank == pp - 1
    slots = m - 2 * pp + rank + 1
    late = Counter({f'I{1 - step % 2}': 0 for step in range(2)})
    late.update(f'I{1 - step % 2}' for step in range(rank + 1, 2 * rank + 2))
    early = Counter(f'B{1 - step % 2}' for step in range(rank + 1))
    found = Counter(
        {
            'F0': 2 * ahead + rank + 1 + last,
            'F1': rank + 1 + ahead,
            'F0&B1': slots - last,
            'F1&B0': slots + ahead,
            'B1': ahead + last + early['B1'],
            'B0': early['B0'],
            'I1': ahead + late['I1'],
            'I0': ahead + late['I0'],
            'W1': ahead + late['I1'],
            'W0': ahead + late['I0'],
        }
    )
    assert found['F0&B1'] + found['F1&B0'] == 2 * m - 3 * pp + rank + 1 - last
    return +found


@pytest.mark.parametrize('pp, m', [(1, 2), (2, 4), (3, 7), (4, 8), (4, 12), (8, 20)])
def test_counts_of_the_eight_steps(pp, m):
    plan, copies = make_plan('dualpipev', pp, m), make_plan('dualpipe', 2 * pp, 2 * m)
    for rank in range(pp):
        expected = eight_steps(pp, m, rank)
        assert kinds_by_chunk(plan, rank) == expected
        assert kinds_by_chunk(copies, rank) == expected
        assert kinds_by_chunk(copies, 2 * pp - 1 - rank) == expected


@pytest.mark.parametrize('pp, m', [(2, 4), (4, 8), (4, 12), (6, 12), (8, 20)])
def test_dualpipe_is_a_v_and_its_mirror(pp, m):
    """Stage s on the way down and stage P - 1 - s on the way back, of either copy."""
    copies, v = make_plan('dualpipe', pp, m), make_plan('dualpipev', pp // 2, m // 2)

    def other_half(op, near):
        if op.parts:
            return fuse(*(other_half(part, near) for part in op.parts))
        back = op.stage >= pp // 2
        return Op(op.kind, op.stage, op.microbatch, int(back) if near else int(not back))

    for rank, ops in enumerate(v.ranks):
        assert copies.ranks[rank] == tuple(other_half(op, True) for op in ops)
        assert copies.ranks[pp - 1 - rank] == tuple(other_half(op, False) for op in ops)


@pytest.mark.parametrize('pp, m', [(1, 2), (2, 4), (4, 8), (4, 13), (8, 32)])
def test_dualpipev_w_differs_in_the_slots_only(pp, m):
    """(F & I), then the W that its I left."""
    together = []
    for ops in make_plan('dualpipev-w', pp, m).ranks:
        merged, rest = [], iter(ops)
        for op in rest:
            if op.kind is Kind.FUSE:
                forward, split = op.parts
                assert split.kind is Kind.I
                assert next(rest) == Op(Kind.W, split.stage, split.microbatch)
                op = fuse(forward, Op(Kind.B, split.stage, split.microbatch))
            merged.append(op)
        together.append(tuple(merged))
    assert tuple(together) == make_plan('dualpipev', pp, m).ranks


@pytest.mark.parametrize('pp, m', [(1, 1), (2, 1), (4, 2), (4, 4), (4, 9), (8, 32)])
def test_zb_h1_is_1f1b_with_late_weights_and_no_more_memory(pp, m):
    plan, stock = make_plan('zb-h1', pp, m), make_plan('1f1b', pp, m)
    for rank, ops in enumerate(plan.ranks):
        without = tuple(
            Op(Kind.B, rank, op.microbatch) if op.kind is Kind.I else op
            for op in ops
            if op.kind is not Kind.W
        )
        assert without == stock.ranks[rank]
        live = [
            sum(op.kind is Kind.F for op in ops[:end]) - sum(op.kind is Kind.W for op in ops[:end])
            for end in range(len(ops) + 1)
        ]
        assert max(live) <= min(pp, m)
        # Rank r puts r of its weight gradients off, the last rank P - 1.
        waiting = [
            sum(op.kind is Kind.I for op in ops[:end]) - sum(op.kind is Kind.W for op in ops[:end])
            for end in range(len(ops) + 1)
        ]
        assert max(waiting) == min(rank + 1, m)


@pytest.mark.parametrize('chunks', [2, 3])
def test_interleaved_warms_up_as_megatron_does(chunks):
    for rank, ops in enumerate(make_plan('interleaved', 4, 12, chunks=chunks).ranks):
        before = next(n for n, op in enumerate(ops) if op.kind is Kind.B)
        assert before == (4 - rank - 1) * 2 + (chunks - 1) * 4 + 1


def test_forward_only_interleaves_the_chunks_of_a_v():
    placement = make_plan('zb-v', 2, 2).placement
    plan = forward_only(placement, 3)
    assert [' '.join(map(str, ops)) for ops in plan.ranks] == [
        '0F0 0F1 3F0 0F2 3F1 3F2',
        '1F0 2F0 1F1 2F1 1F2 2F2',
    ]
    assert plan.forward_only


@pytest.mark.parametrize('m', [1, 2, 7])
@pytest.mark.parametrize('name', ['1f1b', 'interleaved', 'zb-v'])
@pytest.mark.parametrize('pp', [1, 2, 3, 4])
def test_forward_only_runs_on_any_placement_of_one_copy(name, pp, m):
    placement = make_plan(name, pp, 2 * pp).placement
    plan = forward_only(placement, m)
    validate(plan)
    assert forward_only(plan.reversed_ranks().placement, m) == plan.reversed_ranks()


def test_forward_only_refuses_two_copies():
    with pytest.raises(ValueError, match='2 model copies: evaluate one of them'):
        forward_only(make_plan('dualpipe', 2, 4).placement, 2)


@pytest.mark.parametrize(
    'name, pp, m, chunks, text',
    [
        ('dualpipev', 8, 12, 2, 'dualpipev needs at least 2 x pp = 16 microbatches, got 12: use '),
        ('dualpipev-w', 4, 7, 2, 'dualpipev-w needs at least 2 x pp = 8 microbatches, got 7: use '),
        ('dualpipev', 1, 1, 2, 'at least 2 x pp = 2 microbatches, got 1'),
        ('dualpipe', 4, 6, 2, 'dualpipe needs at least 2 x pp = 8 microbatches, got 6'),
        ('dualpipe', 3, 6, 2, 'an even number of ranks, got 3: use dualpipev'),
        ('dualpipe', 4, 9, 2, 'an even number of microbatches, got 9: use dualpipev'),
        ('interleaved', 8, 20, 2, 'in groups of pp = 8, got 20: use a multiple, or 1f1b or zb-v'),
        ('interleaved', 4, 3, 2, 'in groups of pp = 4, got 3'),
        ('interleaved', 4, 4, 1, 'at least 2 chunks a rank, got 1: use 1f1b'),
        ('1f1b', 0, 4, 2, 'pp = 0: at least one'),
        ('zb-v', 4, 0, 2, 'microbatches = 0: at least one'),
        ('dualpipe-v', 4, 8, 2, "'dualpipe-v': no such schedule; there are gpipe, 1f1b, "),
    ],
)
def test_what_does_not_exist_is_refused(name, pp, m, chunks, text):
    with pytest.raises(ValueError) as caught:
        make_plan(name, pp, m, chunks=chunks)
    assert text in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_what_a_refusal_recommends_exists(name):
    for pp, m in NUMBERS:
        reason = obstacle(name, pp, m)
        if reason is None:
            continue
        words = reason.partition(': use ')[2].replace(',', ' ').split()
        others = [word for word in words if word in SCHEDULES]
        assert others and not any(obstacle(other, pp, m) for other in others), reason


def test_the_catalog_describes_itself():
    for name, schedule in SCHEDULES.items():
        assert schedule.name == name and schedule.source
        assert schedule.description and '\n' not in schedule.description


def csv_of(ranks) -> str:
    """As torch's schedules write it: a cell for each slot of time, empty for a bubble."""
    return '\n'.join(','.join('' if a is None else repr(a) for a in row) for row in ranks)


def torch_with_messages(actions) -> list:
    """What torch runs: with messages, and the gathers and reductions of sharded parameters."""
    pp = len(actions)
    sharded = {
        rank: torch_schedules._add_unshard_reshard([a for a in actions[rank] if a is not None])
        for rank in range(pp)
    }
    holders = [min(stage, 2 * pp - 1 - stage) for stage in range(2 * pp)]
    found = torch_schedules._add_send_recv(sharded, holders.__getitem__, 2 * pp)
    return [found[rank] for rank in range(pp)]


@pytest.mark.parametrize('name', ['ScheduleDualPipeV', 'ScheduleZBVZeroBubble'])
def test_torch_csv_is_a_plan(name):
    """Its fused slots, its words for reductions and sharding, and messages without waits."""
    ours = make_plan('dualpipev' if 'Dual' in name else 'zb-v', 3, 8)
    actions = torch_actions(name, 3, 8, 2)
    text = csv_of(actions)
    assert ('OVERLAP_F_B' in text) == ('Dual' in name)
    found = read_plan(text)
    kept = [[op for op in ops if op.kind is not Kind.REDUCE] for ops in found.ranks]
    assert tuple(map(tuple, kept)) == ours.ranks and found.placement == ours.placement
    assert problems(found) == []
    whole = csv_of(torch_with_messages(actions))
    assert 'UNSHARD' in whole and 'RECV_F' in whole and 'WAIT' not in whole
    messages = {op for _, _, op in read_plan(whole).leaves() if op.kind is Kind.WAIT}
    assert messages == {
        op for _, _, op in place_communication(ours).leaves() if op.kind is Kind.WAIT
    }


@pytest.mark.parametrize('pp, m, chunks', [('2', 4, 2), (2.0, 4, 2), (True, 4, 2), (2, '4', 2),
                                           (2, 4.0, 2), (2, 4, None), (None, 4, 2)])  # fmt: skip
def test_what_is_no_number_is_refused(pp, m, chunks):
    with pytest.raises(ValueError, match='not a number of anything; give an integer'):
        make_plan('zb-v', pp, m, chunks=chunks)


@pytest.mark.parametrize('pp, m', [(2, 10**8), (256, 2049), (10**5, 10)])
def test_more_than_anyone_can_follow_is_refused(pp, m):
    with pytest.raises(ValueError, match='more than 1048576 forward passes: too many'):
        make_plan('zb-v', pp, m)


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_some_ranks_only(name):
    whole, part = make_plan(name, 4, 8), make_plan(name, 4, 8, only={1, 2})
    assert part.ranks == ((), *whole.ranks[1:3], ()) and part.placement == whole.placement
