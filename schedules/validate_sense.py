"""Operations and placements that mean nothing; no other check can make sense of them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mhc.schedules.plan import COLLECTIVE, COMMUNICATION, Kind, Op, Plan
from megatron_mhc.schedules.validate_index import Index, standing

SLOTS = ((Kind.F, Kind.B), (Kind.F, Kind.I))
# What a plan without a backward has not.
AFTER_FORWARD = frozenset({Kind.W, Kind.R, Kind.REDUCE})


def wrong_placement(plan: Plan) -> list[str]:
    """Stages that no rank holds, and copies of the model that differ."""
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


def senseless(index: Index) -> list[str]:
    """Operations that mean nothing where they stand, and fused slots of the wrong parts."""
    # From the extremes of every column; only where one is wrong are all operations asked.
    doubtful = {rank for rank, _, op in index.slots if not _is_slot(op)}
    for rank in index.ranks:
        for (kind, payload, stage, direction), column in index.columns[rank].items():
            for mb in (min(column.microbatches), max(column.microbatches)):
                op = Op(kind, stage, mb, direction, payload)
                if _wrong(index.plan, rank, op) is not None:
                    doubtful.add(rank)
    return [finding for rank in sorted(doubtful) for finding in _of(index.plan, rank)]


def _is_slot(op: Op) -> bool:
    return op.kind is Kind.FUSE and tuple(part.kind for part in op.parts) in SLOTS


def _of(plan: Plan, rank: int) -> Iterator[str]:
    for position, op in enumerate(plan.ranks[rank]):
        if op.kind is Kind.FUSE:
            if not _is_slot(op):
                yield f'{standing(rank, position, op)}: a fused slot has an F, then a B or I'
                continue
        elif op.parts:
            yield f'{standing(rank, position, op)}: only a fused slot has parts'
        for leaf in op.leaves:
            wrong = _wrong(plan, rank, leaf)
            if wrong is not None:
                yield f'{standing(rank, position, leaf)}: {wrong}'


def _wrong(plan: Plan, rank: int, op: Op) -> str | None:
    """Why ``op`` means nothing on ``rank``."""
    kind = op.kind
    if kind is Kind.FUSE:
        return 'a fused slot has an F, then a B or I'
    if not (0 <= op.direction < plan.directions and 0 <= op.stage < plan.stages):
        return 'there is no such stage'
    holder = plan.placement[op.direction][op.stage]
    if holder != rank:
        return f'that stage is on rank {holder}'
    if kind in COLLECTIVE:
        if op.microbatch != -1:
            return 'it is of a whole step, not of a microbatch'
    elif not 0 <= op.microbatch < plan.microbatches_of(op.direction):
        return 'there is no such microbatch'
    if kind in COMMUNICATION:
        if op.payload not in ('F', 'B'):
            return 'it carries neither an activation (F) nor a gradient (B)'
        peer = plan.peer(op)
        if peer is None or peer == rank:
            return 'no other rank is at the other end'
    elif op.payload:
        return 'only messages carry something'
    if plan.forward_only and (kind in AFTER_FORWARD or op.payload == 'B'):
        return 'the plan has no backward'
    return None
