"""Checks of what each rank computes: every pass once, and the right gradients from them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from megatron_mhc.schedules.plan import Kind, Op
from megatron_mhc.schedules.validate_index import Index, standing

PASSES = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R)


def repetitions(index: Index) -> Iterator[str]:
    """Nothing is done twice."""
    for rank in index.ranks:
        for (kind, payload, stage, direction), column in index.columns[rank].items():
            if len(set(column.microbatches)) == len(column.microbatches):
                continue
            seen = set()
            for mb, position in zip(*column, strict=True):
                if mb in seen:
                    op = Op(kind, stage, mb, direction, payload)
                    yield f'{standing(rank, position, op)}: stands there a second time'
                seen.add(mb)


def passes(index: Index) -> Iterator[str]:
    """Each microbatch goes forward once, and back once (B, or I and W) unless none goes back."""
    backward = not index.plan.forward_only
    rebuilds = Kind.R in index.plan.kinds
    for rank, stage, direction in index.chunks():
        columns = (index.at(kind, '', stage, direction) for kind in PASSES)
        for mb, (f, b, i, w, r) in enumerate(zip(*columns, strict=True)):
            wrong = [] if f is not None else [(Kind.F, 'missing')]
            if backward and not _right(f, b, i, w):
                wrong += _backward(f, b, i, w)
            if rebuilds:
                wrong += _rebuilding(f, r, i if b is None else b)
            for kind, why in wrong:
                yield f'rank {rank}, {Op(kind, stage, mb, direction)}: {why}'


# The functions below get positions on the rank; None: missing.
def _right(f: int | None, b: int | None, i: int | None, w: int | None) -> bool:
    """Whether ``_backward`` has nothing to find: it is asked a million times."""
    if f is None:
        return False
    if b is None:
        return i is not None and w is not None and f < i < w
    return i is None and w is None and f < b


def _backward(
    f: int | None, b: int | None, i: int | None, w: int | None
) -> Iterator[tuple[Kind, str]]:
    backward = i if b is None else b
    if backward is None:
        yield Kind.B, 'missing, and I and W in its place too'
    elif b is not None and i is not None:
        yield Kind.I, 'B of the same microbatch does its work'
    elif f is not None and backward <= f:
        yield Kind.I if b is None else Kind.B, 'stands before its F'
    if i is not None and w is None:
        yield Kind.W, 'missing, though its I leaves the weight gradients to it'
    elif w is not None and i is None:
        yield Kind.W, 'there is no I that leaves weight gradients to it'
    elif i is not None and w is not None and w <= i:
        yield Kind.W, 'stands before its I'


def _rebuilding(f: int | None, r: int | None, backward: int | None) -> Iterator[tuple[Kind, str]]:
    if r is None:
        yield Kind.R, 'missing, though others are rebuilt'
    elif f is not None and r <= f:
        yield Kind.R, 'stands before its F'
    elif backward is not None and r >= backward:
        yield Kind.R, 'stands after the backward that needs it'


def _gradients(index: Index, stage: int, direction: int) -> list[tuple[int, int, Kind]]:
    """What adds to the weight gradients of a stage, in order: position, microbatch, kind."""
    return sorted(
        (position, mb, kind)
        for kind in (Kind.B, Kind.W)
        for mb, position in enumerate(index.at(kind, '', stage, direction))
        if position is not None
    )


def accumulation(index: Index) -> Iterator[str]:
    """Weight gradients are added in ascending order of microbatches, as one process adds them.

    Input gradients too: what they leave to W waits in a queue per module.
    """
    for rank, stage, direction in index.chunks():
        split = index.at(Kind.I, '', stage, direction)
        inputs = sorted((at, mb, Kind.I) for mb, at in enumerate(split) if at is not None)
        for ops in (_gradients(index, stage, direction), inputs):
            for (_, before, earlier), (_, mb, kind) in pairwise(ops):
                if mb < before:
                    yield (
                        f'rank {rank}, {Op(kind, stage, mb, direction)}: stands after '
                        f'{Op(earlier, stage, before, direction)}; gradients of a stage must be '
                        'added in ascending order of microbatches'
                    )


def slots(index: Index) -> Iterator[str]:
    """The parts of a fused slot run at once, so neither may need the other.

    A backward takes tensors from every forward of its own microbatch and from no other. If it needs
    the slot's forward through the order of operations of other ranks, the execution gets stuck.
    """
    for rank, position, op in index.slots:
        forward, backward = op.parts
        if forward.microbatch == backward.microbatch and forward.direction == backward.direction:
            yield f'{standing(rank, position, op)}: its backward needs its forward'


def collectives(index: Index) -> Iterator[str]:
    """A reduction follows all gradients of its stage, a gather leads; in all stages or none."""
    for rank, stage, direction in index.chunks():
        for kind in (Kind.REDUCE, Kind.PARAM_SYNC):
            if kind not in index.plan.kinds:
                continue
            op = Op(kind, stage, direction=direction)
            column = index.order.get((kind, '', stage, direction))
            if column is None:
                yield f'rank {rank}, {op}: missing, though other stages have it'
                continue
            position = column.positions[0]
            if kind is Kind.REDUCE:
                late = [g for g in _gradients(index, stage, direction)[-1:] if g[0] > position]
                for _, mb, gradient in late:
                    last = Op(gradient, stage, mb, direction)
                    yield f'rank {rank}, {op}: stands before {last}, which adds a gradient'
            else:
                started = index.order.get((Kind.F, '', stage, direction))
                if started is not None and started.positions[0] < position:
                    first = Op(Kind.F, stage, started.microbatches[0], direction)
                    yield f'rank {rank}, {op}: stands after {first}, which needs its parameters'
