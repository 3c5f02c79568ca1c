"""Checks of what crosses ranks: every tensor sent, received and awaited once, in one order."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mhc.schedules.plan import Kind, Op
from megatron_mhc.schedules.validate_index import Index


def messages(index: Index) -> Iterator[str]:
    """A tensor for another rank is sent after it is made, and awaited before it is used."""
    plan = index.plan
    for rank, stage, direction in index.chunks():
        for payload in 'F' if plan.forward_only else 'FB':
            computed = index.computed_at(payload, stage, direction)
            send = plan.peer(Op(Kind.SEND, stage, 0, direction, payload))
            receive = plan.peer(Op(Kind.RECV, stage, 0, direction, payload))
            if send not in (None, rank):
                sent = index.at(Kind.SEND, payload, stage, direction)
                for mb, (made, at) in enumerate(zip(computed, sent, strict=True)):
                    if at is None or (made is not None and at < made):
                        op = Op(Kind.SEND, stage, mb, direction, payload)
                        why = 'missing' if at is None else 'stands before its tensor is made'
                        yield f'rank {rank}, {op} to rank {send}: {why}'
            if receive not in (None, rank):
                columns = (index.at(k, payload, stage, direction) for k in (Kind.RECV, Kind.WAIT))
                for mb, positions in enumerate(zip(*columns, computed, strict=True)):
                    for kind, why in _receiving(*positions):
                        way = 'from' if kind is Kind.RECV else 'for'
                        op = Op(kind, stage, mb, direction, payload)
                        yield f'rank {rank}, {op} {way} rank {receive}: {why}'


def _receiving(posted: int | None, awaited: int | None, used: int | None) -> list[tuple[Kind, str]]:
    """What is wrong with the positions of a tensor's receive, wait and use."""
    found = []
    if posted is None:
        found.append((Kind.RECV, 'missing'))
    if awaited is None:
        return [*found, (Kind.WAIT, 'missing')]
    if posted is not None and awaited < posted:
        found.append((Kind.WAIT, 'stands before its RECV'))
    if used is not None and awaited > used:
        found.append((Kind.WAIT, 'stands after its tensor is used'))
    return found


def queues(index: Index) -> Iterator[str]:
    """A channel hands over in order, so both of its ends must have the same order."""
    plan = index.plan
    for (kind, payload, stage, direction), sent in index.order.items():
        if kind is not Kind.SEND:
            continue
        target = stage + (1 if payload == 'F' else -1)
        received = index.order.get((Kind.RECV, payload, target, direction))
        if received is None or sent.microbatches == received.microbatches:
            continue
        both = zip(sent.microbatches, received.microbatches, strict=False)
        for number, (here, there) in enumerate(both):
            if here != there:
                send = Op(Kind.SEND, stage, here, direction, payload)
                receive = Op(Kind.RECV, target, there, direction, payload)
                yield (
                    f'rank {plan.rank_of(stage, direction)}, {send} to rank {plan.peer(send)}: is '
                    f'message {number} of its channel, but the other end receives {receive} as that'
                )
                break
