"""Schedules on a V that repeat one microbatch's operations, a building block, every six grains.

A grain is the forward of one stage, half of what a rank holds; F = I = W = 1 grain. In six grains a
rank runs F, I and W of both of its stages once, so a block that returns every six grains leaves no
rank idle, and the activations that a rank holds follow from how long the block keeps them
(arXiv 2405.15362). How far a block's operations lie apart trades memory for bubble at
both ends of a step.

A rank does its operations in the order of their grains, as soon as it can. After its last forward
pass nothing new needs memory: from there on an input gradient goes first whenever it can, for the
ranks that wait for it, and weight gradients fill the rest.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import NamedTuple

from megatron_mhc.schedules.plan import Kind, Op

PERIOD = 6
# What a rank does for each microbatch: F of its stage on the way down (chunk 0) and on the way back
# (chunk 1), I of chunk 1 and of chunk 0, then the weight gradients of both.
_KINDS = (Kind.F, Kind.F, Kind.I, Kind.I, Kind.W, Kind.W)
_CHUNKS = (0, 1, 1, 0, 1, 0)
_FORWARDS, _WEIGHTS = (0, 1), (4, 5)
# For F0, F1, I1, I0: how far the rank is away whose same operation comes before.
_BEFORE = (-1, 1, -1, 1)
# (which of the six, microbatch)
Step = tuple[int, int]
# The grain at which each of the six begins for microbatch 0.
Grains = tuple[int, ...]


class Block(NamedTuple):
    """Where the operations of one microbatch lie.

    Args:
        strides: grains from one rank to the next of F0 (down the V), F1 (back), I1 (down), I0.
        turns: grains from F0 to F1 on the last rank, F1 to I1 on rank 0, I1 to I0 on the last rank.
    """

    strides: tuple[int, int, int, int]
    turns: tuple[int, int, int]


@functools.lru_cache(maxsize=4096)
def grains_of(block: Block, pp: int) -> tuple[Grains, ...] | None:
    """Per rank when each operation of microbatch 0 begins; None where two of a rank coincide."""
    (down, back, back_down, home), (turn, loss, last) = block
    end = pp - 1
    first = end * down + turn
    gradient = first + end * back + loss
    found = []
    for rank in range(pp):
        passes = (
            rank * down,
            first + (end - rank) * back,
            gradient + rank * back_down,
            gradient + end * back_down + last + (end - rank) * home,
        )
        free = sorted({*range(PERIOD)} - {grain % PERIOD for grain in passes})
        if len(free) > PERIOD - len(passes):
            return None
        # Each weight gradient in one of the two grains that are left, as early as may be.
        weights = [
            tuple(
                at + 1 + (slot - at - 1) % PERIOD
                for at, slot in zip(passes[2:], slots, strict=True)
            )
            for slots in (free, free[::-1])
        ]
        found.append(passes + min(weights, key=sum))
    return tuple(found)


def chunks_held(grains: Grains) -> int:
    """Most activations, in stages, that a rank holds at once in a long step."""
    most = 0
    for now in grains[:2]:
        held = 0
        for begun, done in ((grains[0], grains[5]), (grains[1], grains[4])):
            held += (now - begun) // PERIOD - (now - done - 1) // PERIOD
        most = max(most, held)
    return most


def operations(block: Block, rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """What ``rank`` does in one step; time and memory are of the order of its own operations.

    Raises:
        ValueError: two operations of a rank coincide.
    """
    grains = _grains(block, pp)
    head, tail = _in_order(grains[rank], microbatches)
    settled = _settled(grains, pp)
    if microbatches <= settled:
        steps = _run(block, pp, microbatches)[0][rank]
    else:
        # The end of a long step is that of a shorter one, with other numbers of microbatches.
        shift = microbatches - settled
        end = _run(block, pp, settled)[0][rank][-len(tail) :]
        steps = head + [(what, mb + shift) for what, mb in end]
    stages = rank, 2 * pp - 1 - rank
    return tuple(Op(_KINDS[what], stages[_CHUNKS[what]], mb) for what, mb in steps)


def bubble(block: Block, pp: int) -> int:
    """Grains by which a long step takes longer than its work, if hops take no time."""
    settled = _settled(_grains(block, pp), pp)
    return _run(block, pp, settled)[1] - PERIOD * settled


def _grains(block: Block, pp: int) -> tuple[Grains, ...]:
    grains = grains_of(block, pp)
    if grains is None:
        raise ValueError(f'{block} on {pp} ranks: two operations of a rank coincide')
    return grains


def _settled(grains: tuple[Grains, ...], pp: int) -> int:
    """A number of microbatches after which more of them change neither end of a step."""
    return max(map(max, grains)) // PERIOD + pp


def _in_order(grains: Grains, microbatches: int) -> tuple[list[Step], list[Step]]:
    """The operations of a rank up to its last forward pass, and those after it, I first."""
    at = sorted(
        (grain + PERIOD * mb, what, mb)
        for what, grain in enumerate(grains)
        for mb in range(microbatches)
    )
    last = max(grains[what] for what in _FORWARDS) + PERIOD * (microbatches - 1)
    head = [(what, mb) for when, what, mb in at if when <= last]
    tail = [(what, mb) for when, what, mb in at if when > last]
    return head, sorted(tail, key=lambda step: step[0] in _WEIGHTS)


@functools.lru_cache(maxsize=64)
def _run(block: Block, pp: int, microbatches: int) -> tuple[list[list[Step]], int]:
    """What every rank does, and the grain at which the last one is done."""
    parts = [_in_order(grains, microbatches) for grains in _grains(block, pp)]
    heads = [deque(head) for head, _ in parts]
    tails = [tail for _, tail in parts]
    done: set[tuple[int, int, int]] = set()
    orders: list[list[Step]] = [[] for _ in range(pp)]
    left, now = len(_KINDS) * microbatches * pp, 0
    while left:
        begun = []
        for rank, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            # Up to the last forward pass in order; after it whatever can go, I first.
            choices = [head[0]] if head else tail
            step = next((step for step in choices if _ready(done, rank, pp, step)), None)
            if step is not None:
                begun.append((rank, step))
                if head:
                    head.popleft()
                else:
                    tail.remove(step)
        for rank, (what, mb) in begun:
            # Done when the next grain begins.
            done.add((what, rank, mb))
            orders[rank].append((what, mb))
        left -= len(begun)
        now += 1
    return orders, now


def _ready(done: set[tuple[int, int, int]], rank: int, pp: int, step: Step) -> bool:
    """Whether what ``step`` needs has been made."""
    what, mb = step
    if what in _WEIGHTS:
        return (what - 2, rank, mb) in done
    before = rank + _BEFORE[what]
    if 0 <= before < pp:
        return (what, before, mb) in done
    # At the ends of the V: the data, or the operation before it on the same rank.
    return what == 0 or (what - 1, rank, mb) in done
