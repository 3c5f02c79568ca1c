"""Closed forms and published tables that the catalog and the simulator must give together."""

import functools

import pytest

from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.times import Times
from megatron_mhc.study.published import ZERO_BUBBLE

make_plan = functools.cache(make_plan)


def run(name, pp, microbatches, chunks=2, **times):
    return simulate(make_plan(name, pp, microbatches, chunks=chunks), Times(**times))


# Makespan bubbles in the time of one whole rank; f, i, w likewise. DualPipe's expression (DeepSeek,
# arXiv 2412.19437, table 2) counts stages: P of them in DualPipe, 2P of half the size in DualPipeV.
CLOSED_FORMS = {
    'gpipe': lambda p, f, i, w: (p - 1) * (f + i + w),
    '1f1b': lambda p, f, i, w: (p - 1) * (f + i + w),
    '1f1b-overlap': lambda p, f, i, w: (p - 1) * (f + i),
    'interleaved': lambda p, f, i, w: (p - 1) * (f + i + w) / 2,
    'zb-h1': lambda p, f, i, w: (p - 1) * (f + i + w - 2 * w),
    'dualpipe': lambda p, f, i, w: (p / 2 - 1) * ((f + i + w) + (i + w) - 3 * w),
    'dualpipev': lambda p, f, i, w: (p - 1) * ((f + i + w) + (i + w) - 3 * w) / 2,
}


# DualPipe's expression holds where F = I >= W: in the middle its ranks set F against I.
TIMES = {name: [(1, 1, 1), (1, 1, 0.75), (2, 2, 1.5)] for name in CLOSED_FORMS}
for straight in ('gpipe', '1f1b', '1f1b-overlap', 'interleaved', 'zb-h1'):
    TIMES[straight] += [(1, 1.25, 0.75), (2, 2.25, 1.5)]


@pytest.mark.parametrize('pp', [4, 8, 16])
@pytest.mark.parametrize('name, f, i, w', [(n, *t) for n, times in TIMES.items() for t in times])
def test_closed_forms(name, f, i, w, pp):
    m = 4 * pp
    timeline = run(name, pp, m, forward=f, input_grad=i, weight_grad=w)
    assert timeline.work == m * (f + i + w)
    assert timeline.bubble == CLOSED_FORMS[name](pp, f, i, w)


@pytest.mark.parametrize('pp', [4, 8, 16])
def test_zb_v_has_no_bubble_within_a_ranks_span(pp):
    timeline = run('zb-v', pp, 4 * pp)
    assert timeline.span_bubble == 0
    assert timeline.bubble == (pp - 1) / 2


def test_more_chunks_divide_the_interleaved_bubble():
    assert run('interleaved', 8, 32, chunks=4).bubble == 21 / 4


BUBBLES = {
    4: {'1f1b': 9, 'interleaved': 4.5, 'zb-h1': 3, 'zb-v': 1.5, 'dualpipev': 3}
    | {'dualpipev-w': 1.5, 'dualpipe': 2},
    8: {'1f1b': 21, 'interleaved': 10.5, 'zb-h1': 7, 'zb-v': 3.5, 'dualpipev': 7}
    | {'dualpipev-w': 3.5, 'dualpipe': 6},
    16: {'1f1b': 45, 'interleaved': 22.5, 'zb-h1': 15, 'zb-v': 7.5, 'dualpipev': 15}
    | {'dualpipev-w': 7.5, 'dualpipe': 14},
}


@pytest.mark.parametrize('pp', BUBBLES)
def test_bubbles_do_not_depend_on_the_number_of_microbatches(pp):
    for name, bubble in BUBBLES[pp].items():
        found = {run(name, pp, m).bubble for m in (2 * pp, 4 * pp, 64)}
        assert found == {bubble}, name


# Share of the step in percent; None where the schedule does not exist.
COLUMNS = ('1f1b', 'interleaved', 'zb-h1', 'zb-v', 'dualpipev', 'dualpipe')
SHARES = {
    (4, 8): (27.3, 15.8, 11.1, 5.9, 11.1, 7.7),
    (4, 20): (13.0, 7.0, 4.8, 2.4, 4.8, 3.2),
    (4, 32): (8.6, 4.5, 3.0, 1.5, 3.0, 2.0),
    (4, 64): (4.5, 2.3, 1.5, 0.8, 1.5, 1.0),
    (8, 8): (46.7, 30.4, 22.6, 22.6, None, None),
    (8, 20): (25.9, None, 10.4, 5.5, 10.4, 9.1),
    (8, 32): (17.9, 9.9, 6.8, 3.5, 6.8, 5.9),
    (8, 64): (9.9, 5.2, 3.5, 1.8, 3.5, 3.0),
    (16, 8): (65.2, None, 48.9, 48.9, None, None),
    (16, 20): (42.9, None, 20.0, 15.5, None, None),
    (16, 32): (31.9, 19.0, 13.5, 7.2, 13.5, 12.7),
    (16, 64): (19.0, 10.5, 7.2, 3.8, 7.2, 6.8),
}


@pytest.mark.parametrize('pp, m', SHARES)
def test_bubble_shares(pp, m):
    for name, share in zip(COLUMNS, SHARES[pp, m], strict=True):
        if share is None:
            with pytest.raises(ValueError):
                make_plan(name, pp, m)
        else:
            assert round(100 * run(name, pp, m).bubble_share, 1) == share, name


@pytest.mark.parametrize('pp', [4, 8, 16])
def test_peak_live_activations(pp):
    peaks = {'1f1b': pp, 'interleaved': 1.5 * pp - 0.5, 'zb-h1': pp, 'zb-v': pp}
    peaks |= {'dualpipev': pp + 0.5, 'dualpipe': pp + 1}
    for name, peak in peaks.items():
        assert run(name, pp, 4 * pp).peak_live == peak, name


@pytest.mark.parametrize('alpha, step', [(1, 103.0), (0.9, 94.9), (0.8, 86.8), (0.67, 76.3)])
def test_what_a_faster_fused_slot_gives(alpha, step):
    found = run('dualpipev', 8, 32, fused_slot_factor=alpha).makespan
    assert found == pytest.approx(step, abs=0.05)
    assert run('1f1b', 8, 32).makespan == 117 and run('interleaved', 8, 32).makespan == 106.5


STEPS = {
    '1f1b': (213, 219.2, 225.4, 237.8, 262.6),
    # Two hops there and back for each rank, once a step.
    '1f1b-overlap': (206, 206.7, 207.4, 208.8, 211.6),
    'interleaved': (202.5, 204, 205.5, 208.5, 214.5),
    'zb-h1': (199, 200.4, 201.8, 204.6, 210.2),
    'zb-v': (195.5, 197.2, 198.8, 202.1, 209),
    'dualpipe': (198, 201.3, 204.5, 211, 224.2),
    'dualpipev': (199, 205.4, 212.3, 226.1, 253.7),
    'dualpipev-w': (195.5, 197.1, 199.2, 203.4, 211.8),
}


@pytest.mark.parametrize('name', STEPS)
def test_step_against_hop(name):
    for hop, step in zip((0, 0.05, 0.1, 0.2, 0.4), STEPS[name], strict=True):
        # Half a unit of the last digit, and what is rounded twice.
        assert run(name, 8, 64, hop=hop).makespan == pytest.approx(step, abs=0.0501), hop


STOCK = [(0, 213), (0.05, 220), (0.1, 226.9), (0.2, 240.8), (0.4, 268.6)]


@pytest.mark.parametrize('hop, step', STOCK)
def test_receives_posted_when_needed_as_stock_megatron_does(hop, step):
    """When there is nothing else to do. That it waits for its own sends too is not counted."""
    plan = lower(make_plan('1f1b', 8, 64))
    ranks = []
    for ops in plan.ranks:
        # Receives of two payloads may wait at a time; each goes just in front of its WAIT.
        late = {op._replace(kind=Kind.WAIT): op for op in ops if op.kind is Kind.RECV}
        others = (op for op in ops if op.kind is not Kind.RECV)
        ranks.append(tuple(o for op in others for o in ((late[op], op) if op in late else (op,))))
    found = simulate(plan.with_ranks(tuple(ranks)), Times(hop=hop)).makespan
    assert found == pytest.approx(step, abs=0.0501)


@pytest.mark.parametrize('times', [(1, 1, 1), (1, 1.25, 0.75), (2, 2, 1)])
def test_1f1b_overlap_hides_hops_up_to_half_of_a_weight_gradient(times):
    """As it is executed, with one receive posted ahead; what it cannot hide it waits for."""
    forward, input_grad, weight_grad = times
    executed = lower(make_plan('1f1b-overlap', 4, 32))
    bubbles = []
    for hop in (0, 0.5 * weight_grad, 0.6 * weight_grad):
        found = simulate(executed, Times(forward, input_grad, weight_grad, hop=hop))
        # There and back through the pipeline once, which nothing hides.
        bubbles.append(found.bubble - 6 * hop)
    assert bubbles[:2] == pytest.approx([3 * (forward + input_grad)] * 2)
    assert bubbles[2] > bubbles[1] + 10 * 0.1 * weight_grad


# P = 8, m = 64. R is 6.7 % of F + B.
RECOMPUTE = 0.067 * 3


@pytest.mark.parametrize('hop, atomic, slot_w', [(0.2, 240.4, 217.7), (0, 212.8, 209.3)])
def test_recompute_inside_the_backward(hop, atomic, slot_w):
    times = {'hop': hop, 'recompute': RECOMPUTE}
    assert run('dualpipev', 8, 64, **times).makespan == pytest.approx(atomic, abs=0.05)
    assert run('dualpipev-w', 8, 64, **times).makespan == pytest.approx(slot_w, abs=0.05)


@pytest.mark.parametrize('hop, atomic, slot_w', [(0.2, 227.9, 214.9), (0, 211.2, 208.4)])
def test_recompute_as_its_own_operation_as_it_is_executed(hop, atomic, slot_w):
    times = Times(hop=hop, recompute=RECOMPUTE)
    for name, step in (('dualpipev', atomic), ('dualpipev-w', slot_w)):
        executed = lower(make_plan(name, 8, 64), recompute=True).reversed_ranks()
        assert simulate(executed, times).makespan == pytest.approx(step, abs=0.05), name


@pytest.mark.parametrize('pp, m, profile, layers, rates', ZERO_BUBBLE)
def test_zero_bubble_papers_table_5(pp, m, profile, layers, rates):
    times = dict(zip(('forward', 'input_grad', 'weight_grad', 'hop'), profile, strict=True))
    one, interleaved, zero = rates
    assert round(run('1f1b', pp, m, **times).bubble_share, 4) == one
    assert round(run('zb-h1', pp, m, **times).bubble_share, 4) == zero
    # The paper's 1F1B-I leaves out p of the hops from the last rank back to the first.
    timeline = run('interleaved', pp, m, chunks=layers // pp, **times)
    step = timeline.makespan - pp * times['hop']
    assert round((step - timeline.work) / step, 4) == interleaved
