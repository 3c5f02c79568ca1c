"""Checks of what each rank computes: every pass once, and the right gradients from them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mhc.schedules.plan import Kind, Op
from megatron_mhc.schedules.validate_index import Index, standing

PASSES = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R)


def repetitions(index: Index) -> Iterator[str]:
    """Nothing is done twice."""
    for rank, position, op in index.repeated:
        yield f'{standing(rank, position, op)}: stands there a second time'


def passes(index: Index) -> Iterator[str]:
    """Each microbatch goes forward once, and back once (B, or I and W) unless none goes back."""
    backward = not index.plan.forward_only
    rebuilds = Kind.R in index.kinds
    for rank, stage, direction in index.chunks():
        for mb in range(index.plan.microbatches_of(direction)):
            key = stage, mb, direction
            f, b, i, w, r = (index.at.get((kind, '', *key)) for kind in PASSES)
            wrong = [] if f is not None else [(Kind.F, 'missing')]
            if backward:
                wrong += _backward(f, b, i, w)
            if rebuilds:
                wrong += _rebuilding(f, r, i if b is None else b)
            for kind, why in wrong:
                yield f'rank {rank}, {Op(kind, *key)}: {why}'


# The functions below get positions on the rank; None: missing.
def _backward(
    f: int | None, b: int | None, i: int | None, w: int | None
) -> Iterator[tuple[Kind, str]]:
    if b is None and i is None:
        yield Kind.B, 'missing, and I and W in its place too'
    elif b is not None and i is not None:
        yield Kind.I, 'B of the same microbatch does its work'
    elif f is not None and (i if b is None else b) <= f:
        yield Kind.I if b is None else Kind.B, 'stands before its F'
    if i is not None and w is None:
        yield Kind.W, 'missing, though its I leaves the weight gradients to it'
    elif w is not None and i is None:
        yield Kind.W, 'there is no I that leaves weight gradients to it'
    elif i is not None and w <= i:
        yield Kind.W, 'stands before its I'


def _rebuilding(f: int | None, r: int | None, backward: int | None) -> Iterator[tuple[Kind, str]]:
    if r is None:
        yield Kind.R, 'missing, though others are rebuilt'
    elif f is not None and r <= f:
        yield Kind.R, 'stands before its F'
    elif backward is not None and r >= backward:
        yield Kind.R, 'stands after the backward that needs it'


def accumulation(index: Index) -> Iterator[str]:
    """Weight gradients are added in ascending order of microbatches, as one process adds them.

    Input gradients too: what they leave to W waits in a queue per module.
    """
    for rank, stage, direction in index.chunks():
        split = index.order[Kind.I, '', stage, direction]
        for ops in (
            index.gradients[stage, direction],
            [Op(Kind.I, stage, mb, direction) for mb in split],
        ):
            for before, op in zip(ops, ops[1:], strict=False):
                if op.microbatch < before.microbatch:
                    yield (
                        f'rank {rank}, {op}: stands after {before}; gradients of a stage must be '
                        'added in ascending order of microbatches'
                    )


def slots(index: Index) -> Iterator[str]:
    """The parts of a fused slot run at once, so neither may need the other.

    A backward takes tensors from every forward of its own microbatch and from no other. If it needs
    the slot's forward through the order of operations of other ranks, the execution gets stuck.
    """
    for rank, position, op in index.slots:
        forward, backward = op.parts
        if (forward.microbatch, forward.direction) == (backward.microbatch, backward.direction):
            yield f'{standing(rank, position, op)}: its backward needs its forward'


def collectives(index: Index) -> Iterator[str]:
    """A reduction follows all gradients of its stage, a gather leads; in all stages or none."""
    for rank, stage, direction in index.chunks():
        for kind in (Kind.REDUCE, Kind.PARAM_SYNC):
            if kind not in index.kinds:
                continue
            op = Op(kind, stage, direction=direction)
            position = index.position(op)
            if position is None:
                yield f'rank {rank}, {op}: missing, though other stages have it'
                continue
            if kind is Kind.REDUCE:
                late = [
                    g for g in index.gradients[stage, direction] if index.position(g) > position
                ]
                if late:
                    yield f'rank {rank}, {op}: stands before {late[0]}, which adds a gradient'
            else:
                started = index.order[Kind.F, '', stage, direction]
                first = Op(Kind.F, stage, started[0], direction) if started else op
                if index.position(first) < position:
                    yield f'rank {rank}, {op}: stands after {first}, which needs its parameters'
