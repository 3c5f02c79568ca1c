"""Two lanes take turns at fixed places, in fixed threads, and neither is left hanging."""

import contextvars
import multiprocessing
import threading
import time

import pytest
import torch

from megatron_mhc.schedules.executor_lanes import in_lanes, run_lanes, yield_lane, yield_point


def steps(name: str, count: int, seen: list):
    def run():
        for step in range(count):
            seen.append(f'{name}{step}')
            yield_lane()
        return name

    return run


@pytest.mark.parametrize(
    ('forward', 'backward', 'first', 'expected'),
    [
        (3, 3, True, 'B0 F0 B1 F1 B2 F2'),
        (3, 3, False, 'F0 B0 F1 B1 F2 B2'),
        (1, 4, True, 'B0 F0 B1 B2 B3'),
        (4, 1, True, 'B0 F0 F1 F2 F3'),
        (0, 2, False, 'B0 B1'),
        (2, 0, True, 'F0 F1'),
    ],
)
def test_lanes_take_turns(forward, backward, first, expected):
    for _ in range(20):
        seen = []
        results = run_lanes(
            steps('F', forward, seen), steps('B', backward, seen), backward_first=first
        )
        assert results == ('F', 'B') and ' '.join(seen) == expected


def test_without_lanes_nothing_is_handed_over():
    assert not in_lanes()
    yield_lane()
    assert run_lanes(in_lanes, in_lanes) == (True, True)
    assert not in_lanes()


def test_forward_stays_in_the_calling_thread_and_backward_in_one_other():
    here = threading.get_ident()
    threads = {run_lanes(threading.get_ident, threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    ((forward, backward),) = threads
    assert forward == here != backward


def test_backward_sees_the_callers_context_but_not_its_gradient_mode():
    variable = contextvars.ContextVar('variable', default='unset')
    variable.set('set')
    with torch.no_grad():
        _, (value, gradients) = run_lanes(
            lambda: None, lambda: (variable.get(), torch.is_grad_enabled())
        )
    assert (value, gradients) == ('set', True)


@pytest.mark.parametrize('failing', ['forward', 'backward'])
@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('after', [0, 1, 2])
def test_error_in_a_lane_unwinds_the_other(failing, first, after):
    seen = []

    def fails():
        for _ in range(after):
            yield_lane()
        raise ValueError('from the lane')

    def other():
        try:
            for _ in range(10):
                yield_lane()
        except Exception:
            seen.append('swallowed')
        finally:
            seen.append('unwound')

    functions = {'forward': other, 'backward': other, failing: fails}
    with pytest.raises(ValueError, match='from the lane'):
        run_lanes(**functions, backward_first=first)
    # A lane that had not begun never does.
    started = after or first != (failing == 'backward')
    assert seen == ['unwound'] * bool(started)
    assert run_lanes(lambda: 1, lambda: 2) == (1, 2)


def test_the_first_error_is_the_one_raised():
    def first():
        raise ValueError('cause')

    def second():
        try:
            yield_lane()
        finally:
            raise KeyError('consequence')

    for forward, backward in ((first, second), (second, first)):
        with pytest.raises(ValueError, match='cause'):
            run_lanes(forward, backward, backward_first=forward is first)


def test_slots_do_not_nest():
    with pytest.raises(RuntimeError, match='do not nest'):
        run_lanes(lambda: run_lanes(int, int), lambda: None)
    assert not in_lanes()


def test_other_threads_yield_for_the_backward():
    """Under CUDA the backward runs in autograd's own thread."""
    seen = []

    def backward():
        thread = threading.Thread(target=steps('B', 2, seen))
        thread.start()
        thread.join()

    run_lanes(steps('F', 2, seen), backward)
    assert seen == ['B0', 'F0', 'B1', 'F1']


def test_a_thread_without_the_turn_has_nothing_to_hand_over():
    """A backward inside the forward, as of a rebuilt region, runs in autograd's thread as well."""
    seen = []

    def forward():
        thread = threading.Thread(target=yield_lane)
        thread.start()
        thread.join(timeout=10)
        seen.append('alive' if thread.is_alive() else 'done')
        yield_lane()

    run_lanes(forward, steps('B', 3, seen), backward_first=False)
    assert seen == ['done', 'B0', 'B1', 'B2']


def test_backward_hands_over_at_a_yield_point():
    seen = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(ctx.name)
            return grad, None

    x = torch.ones(3, requires_grad=True)
    y = x
    for layer in range(3):
        # Seen from the backward: the gradient of the side work, then the hand-over.
        y = Note.apply(yield_point(y), f'B{layer}') * 2
    run_lanes(steps('F', 2, seen), lambda: y.sum().backward())
    assert seen == ['B2', 'F0', 'B1', 'F1', 'B0']
    assert torch.equal(x.grad, torch.full((3,), 8.0))


def test_yield_point_keeps_values_and_needs_no_graph():
    x = torch.randn(4)
    assert torch.equal(yield_point(x), x) and not yield_point(x).requires_grad


def test_error_in_the_forward_stops_a_backward_in_autograd():
    x = torch.ones(2, requires_grad=True)
    loss = (yield_point(x * 2) * 3).sum()

    def fails():
        raise ValueError('from the forward')

    with pytest.raises(ValueError, match='from the forward'):
        run_lanes(fails, loss.backward)
    assert x.grad is None


def _in_child(queue) -> None:
    queue.put(run_lanes(lambda: 1, lambda: 2))


def test_lanes_work_in_a_forked_process():
    run_lanes(int, int)
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=30) == (1, 2)
    finally:
        process.kill()
        process.join()


def test_an_interrupted_forward_lets_the_backward_finish_its_piece():
    seen = []

    def backward():
        time.sleep(0.05)
        seen.append('piece')
        yield_lane()
        seen.append('never')

    def forward():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lanes(forward, backward)
    assert seen == ['piece']
