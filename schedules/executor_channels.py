"""Messages between pipeline ranks: one channel per (peer, kind, chunk).

On a channel, messages leave in the order in which they arrive; between channels there is no order.
That is what a validated plan promises and all that it needs. On the CPU a channel is a tag of the
group. NCCL has no tags: there a channel is a communicator of two ranks, connected when the first
plan that uses it begins; each keeps its own buffers on the device (a few to tens of MiB, which
``NCCL_BUFFSIZE`` scales), at most four for each stage that a rank holds.

When a peer dies or is stuck, gloo's waits end within the group's timeout and the message names the
operation. NCCL's do not return to the host: its watchdog ends the process after the same time, and
the group name that it prints is the channel's.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc.schedules.plan import COMMUNICATION, Kind, Op, Plan

# The shape of the tensor that a SEND or RECV carries, or None where a header says it.
ShapeOf = Callable[[Op], torch.Size | None]
# (source rank, target rank, payload, producing stage, direction)
Channel = tuple[int, int, str, int, int]
# (payload, stage, microbatch, direction)
Key = tuple[str, int, int, int]
# A header is (number of dimensions, sizes ...) in this many integers.
HEADER = 8
# Ranks within a channel.
SOURCE, TARGET = 0, 1


class Pair(Protocol):
    """A communicator of two ranks; the stubs of torch leave both out of its backends."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work: ...


# Channels outlive a transport, which is made for every step. They belong to a group: after
# destroy_process_group there is another one.
_pairs: dict[tuple[dist.ProcessGroup, Channel], Pair] = {}


class Transport:
    """Posts the sends and receives of one rank.

    Args:
        plan: the plan, for who is at the other end of an operation.
        rank: this pipeline rank.
        ranks: the global rank of each pipeline rank.
        group: a process group that has them all.
        shape_of: shape of the tensor that a SEND or RECV carries. None: a header with it is sent
            ahead (under NCCL the receiver's host then waits for it).
        dtype: of every message.
        device: where receive buffers are made.
        timeout: of NCCL channels; give them the group's.

    Raises:
        RuntimeError: a peer did not connect.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        ranks: Sequence[int],
        group: dist.ProcessGroup,
        shape_of: ShapeOf,
        dtype: torch.dtype,
        device: torch.device,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.plan, self.rank, self.ranks, self.group = plan, rank, tuple(ranks), group
        self.shape_of, self.dtype, self.device = shape_of, dtype, device
        self._sent: deque[tuple[Op, list[Tensor], list[dist.Work]]] = deque()
        self._posted: dict[Key, tuple[Op, Tensor, dist.Work]] = {}
        # Receives of unknown shape, in the order of the plan.
        self._unknown: dict[Channel, deque[Op]] = defaultdict(deque)
        self._arrived: dict[Key, Tensor] = {}
        self._tagged = has_tags(group, device)
        if not self._tagged:
            self._connect(timeout)

    def send(self, op: Op, tensor: Tensor) -> None:
        """Start sending ``tensor`` from the current stream; it is kept until it has gone.

        Raises:
            RuntimeError: it is not what the receiver expects.
        """
        shape = self.shape_of(op)
        if tensor.dtype != self.dtype or (shape is not None and tensor.shape != shape):
            raise RuntimeError(
                f'pipeline rank {self.rank}, {op}: the tensor is {list(tensor.shape)} '
                f'{tensor.dtype}, but pipeline rank {self.plan.peer(op)} expects '
                f'{"any shape" if shape is None else list(shape)} {self.dtype}; a module between '
                'the stages changed the hidden states'
            )
        message = [tensor.detach().contiguous()]
        if shape is None:
            message.insert(0, _header(tensor))
        # Never waited for here: gloo's wait lasts until the peer has posted its receive.
        works = [self._post(op, part) for part in message]
        self._sent.append((op, message, works))
        self._release()

    def receive(self, op: Op) -> None:
        """Post the receive of a tensor that ``wait`` will hand over."""
        shape = self.shape_of(op)
        if shape is None:
            self._unknown[self.plan.channel(op)].append(op)
        else:
            buffer = self._buffer(shape)
            self._posted[_key(op)] = op, buffer, self._post(op, buffer)

    def wait(self, op: Op) -> Tensor:
        """The tensor of a posted receive, when it is there."""
        if self.shape_of(op) is None:
            queue = self._unknown[self.plan.channel(op)]
            while _key(op) not in self._arrived:
                first = queue.popleft()
                self._arrived[_key(first)] = self._receive_unknown(first)
            return self._arrived.pop(_key(op))
        _, buffer, work = self._posted.pop(_key(op))
        self._finish(op, work)
        return buffer

    def finish(self) -> None:
        """Wait until everything sent has gone.

        Raises:
            RuntimeError: a receive was posted and never waited for.
        """
        while self._sent:
            op, _, works = self._sent.popleft()
            for work in works:
                self._finish(op, work)
        left = [op for op, _, _ in self._posted.values()]
        left += [op for queue in self._unknown.values() for op in queue]
        if left or self._arrived:
            raise RuntimeError(
                f'pipeline rank {self.rank}: received and never used: '
                f'{", ".join(map(str, left)) or list(self._arrived)}'
            )

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _receive_unknown(self, op: Op) -> Tensor:
        header = self._buffer((HEADER,), torch.int64)
        self._finish(op, self._post(op, header))
        dimensions, *sizes = header.tolist()
        buffer = self._buffer(sizes[:dimensions])
        self._finish(op, self._post(op, buffer))
        return buffer

    def _release(self) -> None:
        """Let go of tensors that have gone. Gloo only says so when it is waited for."""
        while self._sent and all(work.is_completed() for work in self._sent[0][2]):
            self._sent.popleft()

    def _post(self, op: Op, tensor: Tensor) -> dist.Work:
        sends = op.kind is Kind.SEND
        link = self.plan.channel(op)
        try:
            if self._tagged:
                start = dist.isend if sends else dist.irecv
                peer = self.ranks[_other(link, sends)]
                work = start(tensor, peer, group=self.group, tag=_tag(link))
                if work is None:
                    raise RuntimeError('this rank is not in the group')
                return work
            pair = _pairs[self.group, link]
            return pair.send([tensor], TARGET, 0) if sends else pair.recv([tensor], SOURCE, 0)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(self._failure(op)) from error

    def _finish(self, op: Op, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(self._failure(op)) from error

    def _failure(self, op: Op) -> str:
        peer = _other(self.plan.channel(op), op.kind is Kind.SEND)
        return (
            f'pipeline rank {self.rank} (rank {self.ranks[self.rank]}): {op} with pipeline rank '
            f'{peer} (rank {self.ranks[peer]}) did not complete; that rank failed or is stuck: '
            'see its log'
        )

    def _connect(self, timeout: timedelta) -> None:
        """Connect all new channels of this rank in one order that all ranks keep to.

        Connecting blocks the host until the peer does it too. Done when a message is first sent or
        received, two ranks could each wait for the other on different channels.
        """
        ops = self.plan.ranks[self.rank]
        for link in sorted({self.plan.channel(op) for op in ops if op.kind in COMMUNICATION}):
            if (self.group, link) in _pairs:
                continue
            source, target, payload, stage, direction = link
            name = (
                f'pipeline {payload} of stage {stage}{chr(39) * direction}, '
                f'rank {self.ranks[source]} to {self.ranks[target]}'
            )
            sends = source == self.rank
            try:
                pair = self._pair(name, SOURCE if sends else TARGET, timeout)
                # The first message makes the connection.
                token = self._buffer((1,), torch.int64).zero_()
                work = pair.send([token], TARGET, 0) if sends else pair.recv([token], SOURCE, 0)
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(
                    f'pipeline rank {self.rank}: no connection for {name}; the other rank failed '
                    'or is stuck: see its log'
                ) from error
            _pairs[self.group, link] = pair

    def _pair(self, name: str, end: int, timeout: timedelta) -> Pair:
        """This end of a new channel.

        Not ``dist.new_group``: all ranks of the world have to call that, in the same order (with
        ``use_local_synchronization`` as well, since names of groups are counted on each rank).
        """
        # torch has it here, its stub only in a private module.
        store = dist.PrefixStore(name, self.group.get_group_store())  # type: ignore[attr-defined]
        if self.device.type == 'cpu':
            gloo: Pair = dist.ProcessGroupGloo(store, end, 2, timeout)  # type: ignore[assignment]
            return gloo
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        # A new type of string, which not every torch has.
        options.group_name = name  # type: ignore[assignment]
        nccl: Pair = dist.ProcessGroupNCCL(store, end, 2, options)  # type: ignore[assignment]
        return nccl


def has_tags(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether messages of ``group`` are told apart by tags, as they are except under NCCL."""
    return device.type == 'cpu' or dist.get_backend(group) == 'gloo'


def _key(op: Op) -> Key:
    return op.payload, *op.key


def _other(link: Channel, sends: bool) -> int:
    source, target, *_ = link
    return target if sends else source


def _tag(link: Channel) -> int:
    _, _, payload, stage, direction = link
    return (stage * 2 + direction) * 2 + (payload == 'B')


def _header(tensor: Tensor) -> Tensor:
    sizes = [tensor.dim(), *tensor.shape]
    return torch.tensor(sizes + [0] * (HEADER - len(sizes)), device=tensor.device)
