"""Schedules on a V: rank r of P holds stages r and 2 P - 1 - r, so the last rank turns around."""

from __future__ import annotations

from collections import deque

from megatron_mhc.schedules.plan import Kind, Op, fuse


class Rank:
    """The operations of one rank, counted per chunk.

    Args:
        chunks: ``(stage, direction)`` of chunk 0, on the way down, and chunk 1, on the way back.
        late_weights: fused slots leave their W until after the slot.
    """

    def __init__(
        self, chunks: tuple[tuple[int, int], tuple[int, int]], late_weights: bool = False
    ) -> None:
        self.ops: list[Op] = []
        self.late_weights = late_weights
        self._chunks = chunks
        self._next = {(kind, chunk): 0 for kind in 'FB' for chunk in (0, 1)}
        self._weights: deque[Op] = deque()

    def _take(self, kind: Kind, chunk: int) -> Op:
        counter = ('F' if kind is Kind.F else 'B', chunk)
        microbatch = self._next[counter]
        self._next[counter] += 1
        stage, direction = self._chunks[chunk]
        if kind is Kind.I:
            self._weights.append(Op(Kind.W, stage, microbatch, direction))
        return Op(kind, stage, microbatch, direction)

    def forward(self, chunk: int) -> None:
        self.ops.append(self._take(Kind.F, chunk))

    def backward(self, chunk: int) -> None:
        self.ops.append(self._take(Kind.B, chunk))

    def input_gradient(self, chunk: int) -> None:
        self.ops.append(self._take(Kind.I, chunk))

    def weight(self, chunk: int | None = None) -> None:
        """The weight gradient that has waited longest, of one chunk or of both."""
        if chunk is None:
            self.ops.append(self._weights.popleft())
            return
        stage = self._chunks[chunk][0]
        op = next(op for op in self._weights if op.stage == stage)
        self._weights.remove(op)
        self.ops.append(op)

    def split_backward(self, chunk: int) -> None:
        self.input_gradient(chunk)
        self.weight(chunk)

    def count(self, kind: str, chunk: int) -> int:
        """How many forward ('F') or backward ('B') passes of a chunk there are so far."""
        return self._next[kind, chunk]

    def slot(self, forward: int, backward: int) -> None:
        """F of one chunk with the backward of the other."""
        kind = Kind.I if self.late_weights else Kind.B
        self.ops.append(fuse(self._take(Kind.F, forward), self._take(kind, backward)))
        if self.late_weights:
            self.weight()


def eight_steps(this: Rank, rank: int, ranks: int, microbatches: int) -> tuple[Op, ...]:
    """DualPipe's order on one rank (DeepSeek's repository; arXiv 2412.19437, section 3.2.1).

    Args:
        this: the rank's chunks.
        rank: its distance from the end of the pipe.
        ranks: from one end to the turn, or to the middle in DualPipe.
        microbatches: through each chunk; at least twice ``ranks``.
    """
    ahead = ranks - 1 - rank
    for _ in range(2 * ahead):
        this.forward(0)
    for _ in range(rank + 1):
        this.forward(0)
        this.forward(1)
    for _ in range(ahead):
        this.input_gradient(1)
        this.weight()
        this.forward(1)
    for slot in range(microbatches - 2 * ranks + rank + 1):
        if slot == 0 and ahead == 0:
            # There is nothing to hide yet; run apart, the first gradient leaves earlier.
            this.forward(0)
            this.backward(1)
        else:
            this.slot(0, 1)
        this.slot(1, 0)
    for _ in range(ahead):
        this.backward(1)
        this.slot(1, 0)
    for step in range(2 * (rank + 1)):
        # From halfway on the weight gradients are put off: they fill the wait for what follows.
        (this.input_gradient if step > rank else this.backward)(1 - step % 2)
    for _ in range(ahead):
        this.weight()
        this.input_gradient(0)
    for _ in range(rank + 1):
        this.weight()
    return tuple(this.ops)


def dualpipev(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """DualPipeV (DeepSeek): a fused slot runs F of one chunk with B of the other."""
    return eight_steps(_on_v(rank, pp), rank, pp, microbatches)


def dualpipev_w(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """DualPipeV whose slots are (F & I), then W: what a slot sends leaves before its W."""
    return eight_steps(_on_v(rank, pp, late_weights=True), rank, pp, microbatches)


def _on_v(rank: int, pp: int, late_weights: bool = False) -> Rank:
    return Rank(((rank, 0), (2 * pp - 1 - rank, 0)), late_weights)


def zb_v(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """ZB-V (arXiv 2405.15362): the memory of 1F1B on every rank, no bubble in span if F = I = W."""
    # The order needs this many to reach its steady state; those that do not exist are left out.
    enough = max(microbatches, 2 * pp - 1)
    this = _on_v(rank, pp)
    for _ in range(2 * (pp - rank) - 1):
        this.forward(0)
    for _ in range(rank):
        this.forward(1)
        this.forward(0)
    for _ in range(pp - rank):
        this.forward(1)
        this.split_backward(1)
    while this.count('F', 1) < this.count('F', 0) or this.count('F', 0) < enough:
        if this.count('F', 0) < enough:
            this.forward(0)
        this.split_backward(0)
        this.forward(1)
        this.split_backward(1)
    for _ in range(rank):
        this.input_gradient(0)
        this.input_gradient(1)
    for _ in range(pp - rank):
        this.input_gradient(0)
        this.weight(0)
    for _ in range(rank):
        this.weight(1)
    for _ in range(rank):
        this.weight(0)
    return tuple(op for op in this.ops if op.microbatch < microbatches)
