"""Schedules on a V that hold fewer activations than 1F1B, for more bubble at the ends of a step."""

from __future__ import annotations

import functools
import itertools

from megatron_mhc.schedules.building_block import (
    PERIOD,
    Block,
    bubble,
    chunks_held,
    grains_of,
    operations,
)
from megatron_mhc.schedules.plan import Op

# A rank's stages, of which it holds activations singly.
CHUNKS = 2
# What is searched: farther apart than this nothing holds less than P, and nothing gains.
_STRIDES, _TURNS, _LOSSES = range(1, 5), range(1, 4), range(1, PERIOD + 1)


def v_min(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """V-Min (arXiv 2405.15362): a third of 1F1B's activations, and one or two more."""
    # Where a rank's F1 and I1 would coincide, it turns two grains later.
    loss = 3 if pp % 3 == 0 else 1
    return operations(Block((1, 1, 1, 1), (1, loss, 1)), rank, pp, microbatches)


def v_half(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """V-Half (arXiv 2405.15362): half of 1F1B's activations, and one more."""
    loss = 4 if pp % 2 == 0 else 1
    return operations(Block((2, 1, 2, 1), (1, loss, 2)), rank, pp, microbatches)


def v_bound(
    rank: int, pp: int, microbatches: int, live_bound: float | None = None
) -> tuple[Op, ...]:
    """The building block with the least bubble that holds at most ``live_bound`` microbatches."""
    bound = default_bound(pp) if live_bound is None else live_bound
    # No block that is searched holds more than this.
    chunks = int(min(bound, CHUNKS * pp + CHUNKS) * CHUNKS)
    return operations(_searched(pp, chunks), rank, pp, microbatches)


def default_bound(pp: int) -> float:
    """What V-Half holds, in whole forward passes of a rank."""
    return pp // 2 + 1


def bound_obstacle(pp: int, live_bound: float) -> str | None:
    """Why there is no such schedule, and what to do; None if there is."""
    least = min(held for held, _ in _blocks(pp)) / CHUNKS
    if live_bound >= least:
        return None
    return (
        f'no schedule without idle ranks holds at most {live_bound:g} microbatches in flight on '
        f'{pp} ranks, as one needs {least:g} for a microbatch to go down the V and back: give at '
        f'least {least:g}, or recompute activations'
    )


@functools.lru_cache(maxsize=64)
def _searched(pp: int, chunks: int) -> Block:
    """The block of least bubble among those that hold at most ``chunks`` activations."""
    allowed = [(held, block) for held, block in _blocks(pp) if held <= chunks]
    # Blocks coincide alike on as many ranks modulo the period, where they are tried faster.
    tried = pp if pp < 2 * PERIOD else PERIOD + pp % PERIOD
    return min(allowed, key=lambda found: (bubble(found[1], tried), found[0], found[1]))[1]


@functools.lru_cache(maxsize=16)
def _blocks(pp: int) -> tuple[tuple[int, Block], ...]:
    """All blocks in which no operations coincide, with the activations that a rank holds."""
    found = []
    for strides in itertools.product(_STRIDES, _STRIDES, _STRIDES, _STRIDES):
        for turns in itertools.product(_TURNS, _LOSSES, _TURNS):
            block = Block(strides, turns)
            grains = grains_of(block, pp)
            if grains is not None:
                found.append((max(map(chunks_held, grains)), block))
    return tuple(found)
