"""The one place where tensors cross CUDA streams.

``launch`` runs a function on a side stream after everything queued so far on the current one; its
``result`` makes the current stream wait, once, when the result is used. The caching allocator must
know every stream that reads a tensor: it hands freed memory to the stream that allocated it, which
may run ahead. ``record_stream`` tells it, and holds until the tensor is freed, so that it covers
the backward too: autograd replays an operation on the stream of its forward, reading what was saved
there, and itself orders the gradients that cross. Without CUDA everything runs at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@functools.cache
def _stream(name: str, priority: int, device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device=device, priority=priority)


def side_stream(name: str, priority: int = 0) -> torch.cuda.Stream | None:
    """The stream called ``name`` on the current device; None without CUDA.

    Args:
        name: one stream per name, priority and device.
        priority: lower runs first; -1 is above the default streams. A kernel that runs is never
            interrupted: priority decides which waiting blocks start next.
    """
    if not torch.cuda.is_available():
        return None
    return _stream(name, priority, torch.cuda.current_device())


def high_priority_stream() -> torch.cuda.Stream | None:
    """The stream of F_post,res and of rebuilding."""
    return side_stream('high', -1)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Launched[T]:
    """What a function on a side stream returned, or will have when that stream gets there."""

    def __init__(self, value: T, stream: torch.cuda.Stream | None) -> None:
        self._value = value
        self._stream = stream
        self._event = stream.record_event() if stream is not None else None
        self._seen: set[torch.cuda.Stream | None] = {stream}

    def result(self) -> T:
        """The value; whatever the current stream runs next sees it complete."""
        if self._event is not None:
            current = torch.cuda.current_stream()
            if current not in self._seen:
                self._seen.add(current)
                current.wait_event(self._event)
                for tensor in _tensors(self._value):
                    tensor.record_stream(current)
        return self._value

    @contextlib.contextmanager
    def on_its_stream(self) -> Iterator[T]:
        """The value, in a context where the side stream is current: to launch more there."""
        if self._stream is None:
            yield self._value
        else:
            with torch.cuda.stream(self._stream):
                yield self._value


def launch[T](
    stream: torch.cuda.Stream | None, function: Callable[..., T], *args: object
) -> Launched[T]:
    """Run ``function(*args)`` on ``stream``, after what the current stream has queued.

    Args:
        stream: a side stream, or None to run at once on the current one.
        function: launches kernels; tensors it closes over must be among ``args``.
        args: its arguments; tensors in them, also in lists, tuples and dicts, stay alive for
            ``stream``.
    """
    if stream is None:
        return Launched(function(*args), None)
    stream.wait_event(torch.cuda.current_stream().record_event())
    for tensor in _tensors(args):
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        return Launched(function(*args), stream)
