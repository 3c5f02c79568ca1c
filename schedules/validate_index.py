"""Where everything in a plan stands, gathered once for the checks of the validator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from megatron_mhc.schedules.plan import COLLECTIVE, COMMUNICATION, Kind, Op, Plan

# ``(kind, payload, stage, microbatch, direction)``: what an operation is, wherever it stands.
Key = tuple[Kind, str, int, int, int]
# ``(stage, direction)``
Chunk = tuple[int, int]

SLOTS = ((Kind.F, Kind.B), (Kind.F, Kind.I))
# What a plan without a backward has not.
AFTER_FORWARD = frozenset({Kind.W, Kind.R, Kind.REDUCE})


class Index:
    """Positions and orders of the operations of a plan; the parts of fused slots singly.

    Args:
        plan: without ``senseless`` operations.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # First position of each operation on its rank.
        self.at: dict[Key, int] = {}
        # Rank, position, operation of all that stand there once more.
        self.repeated: list[tuple[int, int, Op]] = []
        # Microbatches in the order in which a stage has them, by (kind, payload, stage, direction).
        self.order: dict[tuple[Kind, str, int, int], list[int]] = defaultdict(list)
        # Per chunk the operations that add to its weight gradients, in order.
        self.gradients: dict[Chunk, list[Op]] = defaultdict(list)
        self.slots: list[tuple[int, int, Op]] = []
        for rank, ops in enumerate(plan.ranks):
            for position, op in enumerate(ops):
                if op.parts:
                    self.slots.append((rank, position, op))
                for leaf in op.leaves:
                    self._add(rank, position, leaf)
        self.kinds = {kind for kind, *_ in self.order}
        # Whether the plan says how tensors cross ranks.
        self.lowered = not self.kinds.isdisjoint(COMMUNICATION)

    def _add(self, rank: int, position: int, op: Op) -> None:
        kind, payload, stage, direction = op.kind, op.payload, op.stage, op.direction
        key = kind, payload, stage, op.microbatch, direction
        if key in self.at:
            self.repeated.append((rank, position, op))
            return
        self.at[key] = position
        self.order[kind, payload, stage, direction].append(op.microbatch)
        if kind is Kind.B or kind is Kind.W:
            self.gradients[stage, direction].append(op)

    def position(self, op: Op) -> int | None:
        """Where ``op`` stands on its rank; None if it is missing."""
        return self.at.get((op.kind, op.payload, *op.key))

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """``(rank, stage, direction)`` of all that the plan must run."""
        for direction, holders in enumerate(self.plan.placement):
            for stage, rank in enumerate(holders):
                yield rank, stage, direction


def standing(rank: int, position: int, op: Op) -> str:
    """How findings name an operation."""
    return f'rank {rank}, operation {position}, {op}'


def senseless(plan: Plan) -> list[str]:
    """What means nothing in this plan; no other check can make sense of it."""
    return _placement(plan) or list(_operations(plan))


def _placement(plan: Plan) -> list[str]:
    found = []
    if plan.microbatches < plan.directions:
        found.append(f'{plan.microbatches} microbatches are too few: every model copy needs one')
    for direction, holders in enumerate(plan.placement):
        if len(holders) != plan.stages:
            found.append(f'copy {direction} of the model has {len(holders)} stages, not as copy 0')
        found += [
            f'stage {stage} is placed on rank {rank}: there is no such rank'
            for stage, rank in enumerate(holders)
            if not 0 <= rank < plan.pp
        ]
    return found


def _operations(plan: Plan) -> Iterator[str]:
    counts = [plan.microbatches_of(direction) for direction in range(plan.directions)]
    forward_only = plan.forward_only
    for rank, ops in enumerate(plan.ranks):
        for position, op in enumerate(ops):
            if op.kind is Kind.FUSE:
                if tuple(part.kind for part in op.parts) not in SLOTS:
                    yield f'{standing(rank, position, op)}: a fused slot has an F, then a B or I'
                    continue
            elif op.parts:
                yield f'{standing(rank, position, op)}: only a fused slot has parts'
            for leaf in op.leaves:
                wrong = _wrong(plan, rank, leaf, counts, forward_only)
                if wrong is not None:
                    yield f'{standing(rank, position, leaf)}: {wrong}'


def _wrong(plan: Plan, rank: int, op: Op, counts: list[int], forward_only: bool) -> str | None:
    """Why ``op`` means nothing on ``rank``; ``counts`` are the microbatches by direction."""
    kind = op.kind
    if not (0 <= op.direction < plan.directions and 0 <= op.stage < plan.stages):
        return 'there is no such stage'
    holder = plan.placement[op.direction][op.stage]
    if holder != rank:
        return f'that stage is on rank {holder}'
    if kind in COLLECTIVE:
        if op.microbatch != -1:
            return 'it is of a whole step, not of a microbatch'
    elif not 0 <= op.microbatch < counts[op.direction]:
        return 'there is no such microbatch'
    if kind in COMMUNICATION:
        if op.payload not in ('F', 'B'):
            return 'it carries neither an activation (F) nor a gradient (B)'
        peer = plan.peer(op)
        if peer is None or peer == rank:
            return 'no other rank is at the other end'
    elif op.payload:
        return 'only messages carry something'
    if forward_only and (kind in AFTER_FORWARD or op.payload == 'B'):
        return 'the plan has no backward'
    return None
