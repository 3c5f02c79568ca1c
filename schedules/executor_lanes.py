"""Two microbatches taking turns on one rank: the forward of one, the backward of the other.

In a fused slot both run as coroutines. Where one has launched work on a side stream (an all-to-all,
F_post,res) it hands over, and the other fills the compute stream meanwhile. Only one of them runs
at a time and they change at fixed places, so that every rank issues its collectives in the same
order. Layers need not be cut into pieces: a hand-over is a call, ``yield_lane``, and for the
backward an identity in the graph, ``yield_point``.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class _Abandoned(BaseException):
    """Unwinds a lane whose partner has failed; not an Exception, so that no handler stops it."""


class _Lanes:
    """The turn, passed between the caller's thread (forward) and all others (backward).

    The backward's side is whichever thread autograd uses: its own device thread under CUDA.
    """

    FORWARD, BACKWARD = 0, 1

    def __init__(self, backward_first: bool) -> None:
        self.failure: BaseException | None = None
        self._forward_thread = threading.get_ident()
        self._turn = self.BACKWARD if backward_first else self.FORWARD
        self._done = [False, False]
        self._changed = threading.Condition()

    def wait(self, lane: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == lane or self.failure is not None)
            if self.failure is not None:
                raise _Abandoned

    def hand_over(self) -> None:
        here = threading.get_ident() == self._forward_thread
        lane = self.FORWARD if here else self.BACKWARD
        with self._changed:
            # A backward within the forward also runs on autograd's thread: it has no turn to give.
            if self._done[1 - lane] or self._turn != lane:
                return
            self._turn = 1 - lane
            self._changed.notify_all()
        self.wait(lane)

    def finish(self, lane: int, failure: BaseException | None) -> None:
        with self._changed:
            self._done[lane] = True
            self.failure = self.failure or failure
            self._turn = 1 - lane
            self._changed.notify_all()


_active: _Lanes | None = None


def in_lanes() -> bool:
    """Whether a fused slot is running."""
    return _active is not None


def yield_lane() -> None:
    """Hand over to the other microbatch of a fused slot; outside of one, nothing."""
    if _active is not None:
        _active.hand_over()


class _YieldPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        yield_lane()
        return grad


def yield_point(x: Tensor) -> Tensor:
    """``x``, whose backward hands over once the gradient of what follows has been launched.

    Apply it to the *input* of work on a side stream, and on that stream: autograd replays it there,
    so that the compute stream is not made to wait before the hand-over.
    """
    same: Tensor = _YieldPoint.apply(x)
    return same


def run_lanes[A, B](
    forward: Callable[[], A], backward: Callable[[], B], *, backward_first: bool = True
) -> tuple[A, B]:
    """Run both, one at a time, changing at every ``yield_lane``.

    Args:
        forward: runs in the calling thread.
        backward: runs in another, with this thread's device, stream and context variables.
            Gradients and autocast are as in a new thread: on and off.
        backward_first: which starts.

    Raises:
        RuntimeError: called within a fused slot.
        Exception: what either raised first; the other is unwound before.
    """
    global _active
    if _active is not None:
        raise RuntimeError('fused slots do not nest')
    lanes = _Lanes(backward_first)
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def run[T](lane: int, function: Callable[[], T]) -> list[T]:
        """What ``function`` returned, or nothing where a lane has failed."""
        failure = None
        try:
            lanes.wait(lane)
            return [function()]
        except BaseException as error:
            failure = error
            return []
        finally:
            lanes.finish(lane, failure)

    def run_backward() -> list[B]:
        if stream is None:
            return run(_Lanes.BACKWARD, backward)
        # Both are a thread's own; the stream context sets the device too.
        with torch.cuda.stream(stream):
            return run(_Lanes.BACKWARD, backward)

    _active = lanes
    try:
        other = _worker(os.getpid()).submit(contextvars.copy_context().run, run_backward)
        ours = run(_Lanes.FORWARD, forward)
        theirs = other.result()
    finally:
        _active = None
    if lanes.failure is not None:
        raise lanes.failure
    return ours[0], theirs[0]


@functools.cache
def _worker(process: int) -> ThreadPoolExecutor:
    """The thread of all backward lanes; a forked process has none of its parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix='pipeline backward lane')
