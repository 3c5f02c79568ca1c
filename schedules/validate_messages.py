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
            send = plan.peer(Op(Kind.SEND, stage, 0, direction, payload))
            receive = plan.peer(Op(Kind.RECV, stage, 0, direction, payload))
            for mb in range(plan.microbatches_of(direction)):
                key = stage, mb, direction
                if send not in (None, rank):
                    yield from _sending(index, rank, send, payload, key)
                if receive not in (None, rank):
                    yield from _receiving(index, rank, receive, payload, key)


def _computation(index: Index, payload: str, key: tuple) -> int | None:
    """Position of what makes or uses a tensor."""
    if payload == 'F':
        return index.at.get((Kind.F, '', *key))
    whole = index.at.get((Kind.B, '', *key))
    return index.at.get((Kind.I, '', *key)) if whole is None else whole


def _sending(index: Index, rank: int, peer: int, payload: str, key: tuple) -> Iterator[str]:
    made = _computation(index, payload, key)
    sent = index.at.get((Kind.SEND, payload, *key))
    if sent is None:
        yield f'rank {rank}, {Op(Kind.SEND, *key, payload)} to rank {peer}: missing'
    elif made is not None and sent < made:
        yield (
            f'rank {rank}, {Op(Kind.SEND, *key, payload)} to rank {peer}: stands before its tensor '
            'is made'
        )


def _receiving(index: Index, rank: int, peer: int, payload: str, key: tuple) -> Iterator[str]:
    used = _computation(index, payload, key)
    posted = index.at.get((Kind.RECV, payload, *key))
    awaited = index.at.get((Kind.WAIT, payload, *key))
    if posted is None:
        yield f'rank {rank}, {Op(Kind.RECV, *key, payload)} from rank {peer}: missing'
    if awaited is None:
        yield f'rank {rank}, {Op(Kind.WAIT, *key, payload)} for rank {peer}: missing'
        return
    if posted is not None and awaited < posted:
        yield f'rank {rank}, {Op(Kind.WAIT, *key, payload)} for rank {peer}: stands before its RECV'
    if used is not None and awaited > used:
        yield (
            f'rank {rank}, {Op(Kind.WAIT, *key, payload)} for rank {peer}: stands after its tensor '
            'is used'
        )


def queues(index: Index) -> Iterator[str]:
    """A channel hands over in order, so both of its ends must have the same order."""
    plan = index.plan
    for (kind, payload, stage, direction), sent in index.order.items():
        if kind is not Kind.SEND:
            continue
        target = stage + (1 if payload == 'F' else -1)
        received = index.order.get((Kind.RECV, payload, target, direction), ())
        for number, (here, there) in enumerate(zip(sent, received, strict=False)):
            if here != there:
                send = Op(Kind.SEND, stage, here, direction, payload)
                receive = Op(Kind.RECV, target, there, direction, payload)
                yield (
                    f'rank {plan.rank_of(stage, direction)}, {send} to rank {plan.peer(send)}: is '
                    f'message {number} of its channel, but the other end receives {receive} as that'
                )
                break
