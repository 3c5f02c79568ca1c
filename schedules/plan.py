"""A pipeline schedule as data: for every rank, the ordered list of what it does in one step.

A plan is immutable and knows nothing of torch, tensors or Megatron. Generators make plans, passes
turn plans into plans, the validator proves them, the simulator times them, the executor runs them.

Notation: ``3F5`` is the forward of microbatch 5 through stage 3; stages are numbered in forward
order. A tick marks direction 1 of a bidirectional plan (``3F5'``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple


class Kind(StrEnum):
    """What an operation does. Only the first six take compute time."""

    F = 'F'  # forward of one microbatch through one stage
    B = 'B'  # its whole backward, I and W
    I = 'I'  # noqa: E741  gradient of the stage's input
    W = 'W'  # gradient of the stage's weights; after I of the same microbatch
    R = 'R'  # rebuild what the forward dropped, from the stage's own input
    FUSE = 'FUSE'  # one forward and one backward (B or I), of two microbatches, at once
    SEND = 'SEND'
    RECV = 'RECV'  # post the receive
    WAIT = 'WAIT'  # until a posted receive is there
    REDUCE = 'REDUCE'  # start the data-parallel gradient reduction of a stage
    PARAM_SYNC = 'PARAM_SYNC'  # start the data-parallel parameter gather of a stage


COMMUNICATION = frozenset({Kind.SEND, Kind.RECV, Kind.WAIT})
COLLECTIVE = frozenset({Kind.REDUCE, Kind.PARAM_SYNC})

_LEAF = re.compile(
    r'(?P<stage>\d{1,9})(?P<kind>REDUCE|PARAM_SYNC|F|B|I|W|R(?!E)|SEND_|RECV_|WAIT_)'
    r"(?P<payload>(?<=_)[FB])?(?P<microbatch>\d{1,9})?(?P<tick>')?$",
    re.ASCII,
)


class Op(NamedTuple):
    """One operation of one rank; a tuple, since a large plan has millions of them.

    Args:
        kind: what is done.
        stage: 0 .. stages - 1 in forward order. A SEND names the stage that produced the tensor, a
            RECV or WAIT the stage that consumes it.
        microbatch: from 0 within its direction; -1 where there is none (REDUCE, PARAM_SYNC, FUSE).
        direction: 0, or 1 for the second model copy of a bidirectional plan.
        payload: SEND, RECV, WAIT: ``F``, the activation from stage to stage + 1, or ``B``, the
            gradient from stage to stage - 1. Empty elsewhere.
        parts: FUSE: the forward, then the backward.
    """

    kind: Kind
    stage: int
    microbatch: int = -1
    direction: int = 0
    payload: str = ''
    parts: tuple[Op, ...] = ()

    def __str__(self) -> str:
        if self.kind is Kind.FUSE:
            return f'({";".join(map(str, self.parts))})FUSE'
        kind = f'{self.kind}_{self.payload}' if self.payload else str(self.kind)
        microbatch = '' if self.microbatch < 0 else str(self.microbatch)
        return f'{self.stage}{kind}{microbatch}{chr(39) if self.direction else ""}'

    @classmethod
    def parse(cls, text: str) -> Op:
        """The operation that ``str`` writes as ``text``.

        Raises:
            ValueError: not an operation.
        """
        text = text.strip()
        if text.startswith('(') and text.endswith(')FUSE'):
            return fuse(*(cls.parse(part) for part in text[1 : -len(')FUSE')].split(';')))
        found = _LEAF.match(text)
        if found is None:
            raise ValueError(f'{text!r} is not an operation of a plan; one looks like 3F5')
        kind = Kind(found['kind'].rstrip('_'))
        if (kind in COMMUNICATION) != bool(found['payload']) or (
            (kind in COLLECTIVE) != (found['microbatch'] is None)
        ):
            raise ValueError(f'{text!r} is not an operation of a plan; one looks like 3SEND_F5')
        return cls(
            kind,
            int(found['stage']),
            int(found['microbatch'] or -1),
            int(found['tick'] is not None),
            found['payload'] or '',
        )

    @property
    def leaves(self) -> tuple[Op, ...]:
        """The operations done here: the parts of a FUSE, else this one."""
        return self.parts or (self,)

    @property
    def key(self) -> tuple[int, int, int]:
        """``(stage, microbatch, direction)``: what an activation belongs to."""
        return self.stage, self.microbatch, self.direction


def fuse(*parts: Op) -> Op:
    """A slot that runs ``parts``, a forward and a backward, together.

    Raises:
        ValueError: the parts are not one F and one B or I, in this order.
    """
    kinds = tuple(part.kind for part in parts)
    if kinds not in ((Kind.F, Kind.B), (Kind.F, Kind.I)):
        raise ValueError(f'a fused slot holds F and B, or F and I, not {" and ".join(kinds)}')
    return Op(Kind.FUSE, parts[0].stage, direction=parts[0].direction, parts=parts)


@dataclass(frozen=True)
class Plan:
    """Who does what, in which order, in one training step (or one evaluation step).

    Args:
        schedule: name of the generator, for messages.
        microbatches: of the whole step, over both directions.
        placement: ``placement[direction][stage]`` is the rank that holds the stage.
        ranks: the operations of each rank, in order. A part of a plan, as a rank needs it that runs
            its own operations, has none for the others.
    """

    schedule: str
    microbatches: int
    placement: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[Op, ...], ...]

    @property
    def pp(self) -> int:
        """Number of pipeline ranks P."""
        return len(self.ranks)

    @property
    def stages(self) -> int:
        """Number of stages of one model copy."""
        return len(self.placement[0])

    @property
    def directions(self) -> int:
        """Model copies: 2 in a bidirectional plan, else 1."""
        return len(self.placement)

    @cached_property
    def chunks(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per rank the ``(stage, direction)`` pairs that it holds, by direction and stage."""
        return tuple(
            tuple(
                (stage, direction)
                for direction, holders in enumerate(self.placement)
                for stage, holder in enumerate(holders)
                if holder == rank
            )
            for rank in range(self.pp)
        )

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        """Of all operations, fused slots and their parts."""
        found: set[Kind] = set()
        for ops in self.ranks:
            found.update(map(attrgetter('kind'), ops))
        if Kind.FUSE in found:
            found |= {part.kind for ops in self.ranks for op in ops for part in op.parts}
        return frozenset(found)

    @property
    def forward_only(self) -> bool:
        """Whether no rank runs a backward."""
        return self.kinds.isdisjoint((Kind.B, Kind.I))

    def microbatches_of(self, direction: int) -> int:
        """How many microbatches run in ``direction``; direction 0 takes the odd one."""
        return (self.microbatches + self.directions - 1 - direction) // self.directions

    def rank_of(self, stage: int, direction: int = 0) -> int:
        """The rank that holds ``stage`` of the model copy ``direction``."""
        return self.placement[direction][stage]

    def peer(self, op: Op) -> int | None:
        """The rank at the other end of ``op``'s tensor; None if the stage has no neighbour there.

        For SEND, RECV and WAIT, and for F, B or I the rank that gets its result.
        """
        receives = op.kind in (Kind.RECV, Kind.WAIT)
        forward = op.payload == 'F' if op.payload else op.kind is Kind.F
        stage = op.stage + (1 if forward != receives else -1)
        return self.rank_of(stage, op.direction) if 0 <= stage < self.stages else None

    def channel(self, op: Op) -> tuple[int, int, str, int, int]:
        """What a SEND, RECV or WAIT uses, alike at both ends: one per (peer, kind, chunk).

        ``(source rank, target rank, payload, producing stage, direction)``

        Raises:
            ValueError: its stage has no neighbour there.
        """
        here, there = self.rank_of(op.stage, op.direction), self.peer(op)
        if there is None:
            raise ValueError(f'{op}: there is no stage at its other end; validate the plan')
        if op.kind is Kind.SEND:
            return here, there, op.payload, op.stage, op.direction
        stage = op.stage + (-1 if op.payload == 'F' else 1)
        return there, here, op.payload, stage, op.direction

    def leaves(self) -> Iterator[tuple[int, int, Op]]:
        """``(rank, position, op)`` of all operations, the parts of fused slots singly."""
        for rank, ops in enumerate(self.ranks):
            for position, op in enumerate(ops):
                for leaf in op.leaves:
                    yield rank, position, leaf

    def with_ranks(self, ranks: tuple[tuple[Op, ...], ...]) -> Plan:
        """The same schedule with other operation lists, as a pass returns it."""
        return replace(self, ranks=ranks)

    def reversed_ranks(self) -> Plan:
        """The same plan with rank r renamed P - 1 - r.

        A V becomes the inverted V: rank r holds stages P - 1 - r and P + r, and the last rank has
        both ends of the model.
        """
        placement = tuple(tuple(self.pp - 1 - r for r in holders) for holders in self.placement)
        return replace(self, placement=placement, ranks=self.ranks[::-1])
