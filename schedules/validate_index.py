"""Where everything in a plan stands, gathered once for the checks of the validator.

A plan of 64 ranks and 1024 microbatches has a million operations, so each of them is looked at once
here; the checks compare whole columns of positions, one for each kind of operation and stage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from megatron_mhc.schedules.plan import COMMUNICATION, Kind, Op, Plan

# ``(kind, payload, stage, direction)``: what an operation is, but for its microbatch.
Head = tuple[Kind, str, int, int]


class Column(NamedTuple):
    """The operations of one head on a rank, in order: their microbatches and positions."""

    microbatches: list[int]
    positions: list[int]


class Index:
    """Positions and orders of the operations of a plan; the parts of fused slots singly.

    Args:
        plan: whose stages are on ranks that exist.
        ranks: those to look at; all of them by default.
    """

    def __init__(self, plan: Plan, ranks: Collection[int] | None = None) -> None:
        self.plan = plan
        # Whether nothing is left out, so that an execution can be followed.
        self.whole = ranks is None
        self.ranks = range(plan.pp) if ranks is None else sorted(ranks)
        self.slots: list[tuple[int, int, Op]] = []
        self.columns = {rank: self._columns(rank) for rank in self.ranks}
        # Whether the plan says how tensors cross ranks.
        self.lowered = not plan.kinds.isdisjoint(COMMUNICATION)

    def _columns(self, rank: int) -> dict[Head, Column]:
        found: dict[Head, Column] = {}
        for position, op in enumerate(self.plan.ranks[rank]):
            if op.parts:
                self.slots.append((rank, position, op))
            # The leaves, without a call for each of a million operations.
            for kind, stage, microbatch, direction, payload, _ in op.parts or (op,):
                head = kind, payload, stage, direction
                column = found.get(head)
                if column is None:
                    column = found[head] = Column([], [])
                column.microbatches.append(microbatch)
                column.positions.append(position)
        return found

    # What follows needs a plan in which every operation stands on the rank that holds its stage.
    @cached_property
    def order(self) -> dict[Head, Column]:
        """The columns of all ranks."""
        return {head: column for found in self.columns.values() for head, column in found.items()}

    @cached_property
    def _at(self) -> dict[Head, Sequence[int | None]]:
        return {
            head: self._by_microbatch(head[3], column)
            for head, column in self.order.items()
            if column.microbatches[0] >= 0
        }

    def _by_microbatch(self, direction: int, column: Column) -> Sequence[int | None]:
        count = self.plan.microbatches_of(direction)
        if column.microbatches == list(range(count)):
            return column.positions
        found: list[int | None] = [None] * count
        # The first one stays, where one stands there twice.
        for microbatch, position in zip(*(reversed(part) for part in column), strict=True):
            found[microbatch] = position
        return found

    def at(self, kind: Kind, payload: str, stage: int, direction: int) -> Sequence[int | None]:
        """Positions by microbatch; None where the operation is missing."""
        missing: Sequence[int | None] = [None] * self.plan.microbatches_of(direction)
        return self._at.get((kind, payload, stage, direction), missing)

    def backward_at(self, stage: int, direction: int) -> Sequence[int | None]:
        """Positions by microbatch of what gives the gradient of the input, B or I."""
        whole, split = (self.at(kind, '', stage, direction) for kind in (Kind.B, Kind.I))
        return [i if b is None else b for b, i in zip(whole, split, strict=True)]

    def computed_at(self, payload: str, stage: int, direction: int) -> Sequence[int | None]:
        """Positions by microbatch of what makes or uses a tensor of this payload."""
        if payload == 'F':
            return self.at(Kind.F, '', stage, direction)
        return self.backward_at(stage, direction)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """``(rank, stage, direction)`` of all that the plan must run, on the ranks looked at."""
        for direction, holders in enumerate(self.plan.placement):
            for stage, rank in enumerate(holders):
                if rank in self.ranks:
                    yield rank, stage, direction


def standing(rank: int, position: int, op: Op) -> str:
    """How findings name an operation."""
    return f'rank {rank}, operation {position}, {op}'
