"""Drop what the mHC kernels produce in a forward and rebuild it for the backward, in segments.

mHC, section 4.3.2: of a segment of sublayers only its first streams and every sublayer's output are
kept; streams, maps and sublayer inputs come back by running the kernels again, never the sublayers.
The backward needs the last segment first; the others are rebuilt one at a time, when it gets there.

The graph stays as it is; only the tensors saved in it are taken out, so that gradients are those
without recomputation, bit for bit. A sublayer saves its input in its own graph: that one keeps its
place and loses its storage.

Which segment a sublayer belongs to travels on the streams (``SEGMENT``). What comes from
elsewhere (another stage, a checkpoint, a hook that replaced or changed it) begins a new segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_mhc import ops
from megatron_mhc.kernels.reference.dropout import dropout_seed
from megatron_mhc.residual.attached import SEGMENT
from megatron_mhc.residual.hyper_connection import HyperConnection, Pending
from megatron_mhc.schedules.executor_streams import Launched, launch

# Streams, and what was read from them: sublayer input and what its write needs.
Written = tuple[Tensor, Tensor | None, ops.Carried | None]
Read = tuple[Tensor, Tensor, ops.Carried]

_OPENED: ContextVar[list[RecomputedSegment] | None] = ContextVar(
    'megatron_mhc_segments', default=None
)


@contextlib.contextmanager
def opened_segments() -> Iterator[list[RecomputedSegment]]:
    """The segments that the forward inside opens, first to last, as they come."""
    segments: list[RecomputedSegment] = []
    token = _OPENED.set(segments)
    try:
        yield segments
    finally:
        _OPENED.reset(token)


def segment_of(x: Tensor, size: int) -> RecomputedSegment | None:
    """The segment of the sublayer that reads ``x``; None where nothing is recomputed.

    Args:
        x: streams. Those that a sublayer left bring its segment along.
        size: sublayers in a segment, 0 for no recomputation.
    """
    # Taken in any case: streams bring a segment along once.
    segment = SEGMENT.take(x)
    if size == 0 or not torch.is_grad_enabled():
        return None
    return segment or RecomputedSegment(size)


type _Kind = tuple[torch.Size, torch.dtype]


class _Slot:
    """The place of one tensor saved for the backward."""

    __slots__ = ('kind', 'tensor')

    def __init__(self, kind: _Kind, tensor: Tensor | None = None) -> None:
        self.kind = kind
        self.tensor = tensor


class _Input(NamedTuple):
    """A sublayer's input. ``alias`` has a version of its own, so that refilling is no change."""

    alias: Tensor
    nbytes: int

    @classmethod
    def of(cls, u: Tensor) -> _Input:
        return cls(u.data, u.untyped_storage().nbytes())

    def drop(self) -> None:
        self.alias.untyped_storage().resize_(0)

    def refill(self, u: Tensor) -> None:
        self.alias.untyped_storage().resize_(self.nbytes)
        self.alias.copy_(u)


class _Step(NamedTuple):
    """One pass of the kernels: from the streams and reads of the step before to the next ones."""

    run: Callable[[Tensor | None, ops.Carried | None], Written]
    input: _Input | None


class RecomputedSegment:
    """Up to ``size`` sublayers of one forward. Independent of other segments and microbatches.

    Every sublayer calls ``read``, unless the write before read ahead for it, and ``write``.
    ``rebuild`` may be called ahead of the backward; else the backward does so when it arrives.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        self._steps: list[_Step] = []
        self._slots: list[_Slot] = []
        self._kept: list[Tensor] = []
        self._kept_storages: set[int] = set()
        # Of the sublayer that runs.
        self._inputs: list[_Input] = []
        self._rebuilt: Launched[list[Tensor]] | None = None
        self._home = _current_stream()
        opened = _OPENED.get()
        if opened is not None:
            opened.append(self)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What the forward keeps: first streams, sublayer outputs, dropout seeds."""
        return tuple(self._kept)

    @property
    def ends(self) -> bool:
        """Whether the sublayer that runs is the last one."""
        return self._left == 1

    def read(self, connection: HyperConnection, x: Tensor) -> Read:
        """``connection(x)``, to be dropped. ``x`` is kept unless the segment itself made it."""
        start = None if self._steps else self._keep(x)

        def run(x: Tensor | None, carried: ops.Carried | None) -> Written:
            result: Read = connection(x if start is None else start)
            return result

        with self._saving():
            result: Read = connection(x)
        self._record(run, result[1])
        return result

    def write(self, write: Callable[[Pending], Written], pending: Pending) -> Written:
        """``write(pending)``, to be dropped, and the inputs of the sublayer with it."""
        if pending.dropout > 0 and pending.seed is None:
            pending = pending._replace(seed=dropout_seed(pending.y.device))
        y, dropout, seed = self._keep(pending.y), pending.dropout, pending.seed
        bias = None if pending.bias is None else _leaf(pending.bias)
        if seed is not None:
            self._keep(seed)

        def run(x: Tensor | None, carried: ops.Carried | None) -> Written:
            assert carried is not None
            return write(Pending(y, carried, bias, dropout, seed))

        for given in self._inputs:
            # An identity in a sublayer's place returns its input.
            if not self._keeps(given.alias):
                given.drop()
        self._inputs.clear()
        with self._saving():
            result = write(pending)
        self._record(run, result[1])
        self._left -= 1
        if self._left:
            # The streams hold the segment, never the other way round: a cycle would hold memory.
            SEGMENT.attach(result[0], self)
        return result

    def rebuild(self, stream: torch.cuda.Stream | None = None) -> None:
        """Run the kernels of the forward again. The second time, nothing happens.

        Args:
            stream: where; None is the current stream. The backward waits for it by itself.

        Raises:
            RuntimeError: the kernels do not save what they saved in the forward.
        """
        if self._steps:
            stream = stream or _current_stream()
            self._rebuilt = launch(stream, self._run_again, self.kept)
            self._steps, self._slots, self._kept = [], [], []
            self._kept_storages.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(_leaf(tensor))
        self._kept_storages.add(tensor.untyped_storage()._cdata)
        return self._kept[-1]

    def _keeps(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._kept_storages

    def _record(self, run: Callable[..., Written], u: Tensor | None) -> None:
        given = None
        if u is not None:
            given = _Input.of(u)
            self._inputs.append(given)
        self._steps.append(_Step(run, given))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        with saved_tensors_hooks(self._save, self._load):
            yield

    def _save(self, tensor: Tensor) -> _Slot:
        if self._keeps(tensor):
            return _Slot(_kind(tensor), tensor.detach())
        slot = _Slot(_kind(tensor))
        self._slots.append(slot)
        return slot

    def _load(self, slot: _Slot) -> Tensor:
        if slot.tensor is None:
            self.rebuild()
        if self._rebuilt is not None:
            # It is read here, and on the stream of the forward, where the sublayers run.
            with _on(self._home):
                self._rebuilt.result()
            self._rebuilt.result()
            self._rebuilt = None
        assert slot.tensor is not None
        return slot.tensor

    def _run_again(self, kept: tuple[Tensor, ...]) -> list[Tensor]:
        slots, filled = iter(self._slots), []

        def fill(tensor: Tensor) -> None:
            if not self._keeps(tensor):
                slot = next(slots, None)
                if slot is None or slot.kind != _kind(tensor):
                    raise RuntimeError(_DIFFERENT)
                slot.tensor = tensor.detach()
                filled.append(slot.tensor)

        x = carried = None
        with torch.enable_grad(), saved_tensors_hooks(fill, _load_nothing):
            for step in self._steps:
                x, u, carried = step.run(x, carried)
                if step.input is not None:
                    assert u is not None
                    with torch.no_grad():
                        step.input.refill(u)
                    filled.append(step.input.alias)
        if next(slots, None) is not None:
            raise RuntimeError(_DIFFERENT)
        return filled


_DIFFERENT = (
    'the mHC kernels did not save the same tensors when they were run again as in the forward: a '
    'parameter was frozen, or the kernel backend changed, between the two'
)


def _kind(tensor: Tensor) -> _Kind:
    return tensor.shape, tensor.dtype


def _load_nothing(saved: Any) -> Tensor:
    raise AssertionError('no backward runs through a rebuild')


def _leaf(tensor: Tensor) -> Tensor:
    """An alias outside of the graph that lets as much of it be built."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _current_stream() -> torch.cuda.Stream | None:
    return torch.cuda.current_stream() if torch.cuda.is_available() else None


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
