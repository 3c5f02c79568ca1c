"""Abstract execution of a plan: does every rank get to its end?

A SEND hands its tensor to its channel and its rank goes on, unless the message before it is still
in the channel, which it leaves when its RECV is posted. So a channel, one per (peer, kind, chunk),
holds one message. A RECV never waits; a WAIT waits until its message was sent. In a plan without
messages, a computation waits until the neighbouring stages have what it needs.

What has happened stays so, and that is all that anything waits for: if one order of execution gets
to the end, every order does, at any speed of ranks and links. Channels that hold more, as gloo's
and NCCL's do for a rank that only posts its sends, just take waits away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TypeGuard

from megatron_mhc.schedules.plan import Kind, Op
from megatron_mhc.schedules.validate_index import Index

# ``(here, other, there)``: the operation at ``here`` of a rank waits for that at ``there`` of rank
# ``other``. A plain tuple, since a large plan has millions of them.
Need = tuple[int, int, int]


def stuck(index: Index) -> list[str]:
    """The operations at which ranks wait for ever; empty if all ranks finish.

    Args:
        index: of a whole plan that has every pass and, if any, every message, in one order.
    """
    needs = _needs(index)
    # Per rank how many of its needs are met, and the operation that it has got to.
    met, reached = [0] * len(needs), [0] * len(needs)
    # Per rank, what others wait for: the operation, and who waits.
    watched: list[list[tuple[int, int]]] = [[] for _ in needs]
    ready = list(range(len(needs)))
    while ready:
        rank = ready.pop()
        mine, number = needs[rank], met[rank]
        while number < len(mine) and mine[number][2] < reached[mine[number][1]]:
            number += 1
        met[rank] = number
        if number < len(mine):
            reached[rank], other, there = mine[number]
            watched[other].append((there, rank))
        else:
            reached[rank] = len(index.plan.ranks[rank])
        if watched[rank]:
            now = reached[rank]
            ready += [waiter for there, waiter in watched[rank] if there < now]
            watched[rank] = [watch for watch in watched[rank] if watch[0] >= now]
    return [
        _waiting(index, rank, needs[rank][number])
        for rank, number in enumerate(met)
        if number < len(needs[rank])
    ]


def _needs(index: Index) -> list[list[Need]]:
    """Of every rank, in the order of its operations."""
    needs: list[list[Need]] = [[] for _ in index.ranks]
    for rank, stage, direction in index.chunks():
        for payload, source in (('F', stage - 1), ('B', stage + 1)):
            if not 0 <= source < index.plan.stages:
                continue
            other = index.plan.rank_of(source, direction)
            if other != rank and index.lowered:
                waits = index.at(Kind.WAIT, payload, stage, direction)
                sent = index.order.get((Kind.SEND, payload, source, direction))
                if sent is None:
                    # A plan without a backward.
                    continue
                needs[rank] += _all(waits, other, index.at(Kind.SEND, payload, source, direction))
                posted = index.order[Kind.RECV, payload, stage, direction]
                # A message leaves when the one before it was asked for.
                needs[other] += _all(sent.positions[1:], rank, posted.positions)
            else:
                made = index.computed_at(payload, source, direction)
                used = index.computed_at(payload, stage, direction)
                if used[0] is None:
                    continue
                found = _all(used, other, made)
                if other == rank:
                    # What stands before it has happened.
                    found = [need for need in found if need[2] >= need[0]]
                needs[rank] += found
    for mine in needs:
        mine.sort()
    return needs


def _all(here: Sequence[int | None], other: int, there: Sequence[int | None]) -> Iterable[Need]:
    assert _complete(here) and _complete(there)
    return zip(here, repeat(other), there, strict=False)


def _complete(positions: Sequence[int | None]) -> TypeGuard[Sequence[int]]:
    return None not in positions


def _waiting(index: Index, rank: int, need: Need) -> str:
    here, other, there = need
    op, awaited = index.plan.ranks[rank][here], index.plan.ranks[other][there]
    if awaited.kind is Kind.RECV:
        column = index.order[Kind.RECV, awaited.payload, awaited.stage, awaited.direction]
        number = column.positions.index(there)
        what = f'rank {other} to post the receive of message {number}'
    else:
        what = f'{_given(op, awaited)} of rank {other}'
    return f'rank {rank}, operation {here}, {op}: waits for ever for {what}'


def _given(op: Op, awaited: Op) -> Op:
    """The part of ``awaited`` whose result a part of ``op`` takes."""
    for taker in op.leaves:
        for giver in awaited.leaves:
            onwards = giver.stage + (1 if giver.kind is Kind.F else -1)
            if (onwards, giver.microbatch, giver.direction) == taker.key and (
                (giver.kind is Kind.F) == (taker.kind is Kind.F)
            ):
                return giver
    return awaited
