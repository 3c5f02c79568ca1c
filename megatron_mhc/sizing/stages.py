"""Where a model is cut into the stages of a pipeline.

A GPT's layers are alike, and are counted. Those of a hybrid model are not: its stages have FLOPs as
even as the places allow where its pattern may be cut, the output layer with the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

from megatron_mhc.schedules.pattern_stages import in_stages
from megatron_mhc.schedules.stage_layers import layer_counts
from megatron_mhc.sizing.flops import head_flops, layer_flops
from megatron_mhc.sizing.shape import ModelShape


def stage_counts(shape: ModelShape, pp: int, placement: str, chunks: int) -> list[int]:
    """Layers of each stage in forward order.

    Args:
        shape: the model.
        pp: pipeline ranks.
        placement: as ``schedules.catalog`` names it.
        chunks: stages of a rank.

    Raises:
        ValueError: fewer layers, or parts of a pattern, than stages.
    """
    if shape.pattern is None:
        return layer_counts(shape.layers, pp, placement, chunks)
    parts, stages = pieces(shape.pattern), pp * chunks
    if len(parts) < stages:
        raise ValueError(
            f'--hybrid-layer-pattern {shape.pattern}: {len(parts)} parts on {stages} stages; use '
            f'at most {len(parts) // chunks} pipeline ranks, or fewer virtual stages'
        )
    costs = {symbol: layer_flops(shape, symbol).total() for symbol in set(''.join(parts))}
    works = tuple(sum(costs[symbol] for symbol in part) for part in parts)
    held = even_parts(works, stages, head_flops(shape))
    ends = [0, *accumulate(held)]
    return [len(''.join(parts[a:b])) for a, b in zip(ends, ends[1:], strict=False)]


def staged_pattern(shape: ModelShape, counts: Sequence[int]) -> str:
    """The hybrid pattern with ``|`` between stages of so many layers, and nowhere else."""
    return in_stages((shape.pattern or '').replace('|', ''), counts)


def pieces(pattern: str) -> list[str]:
    """What no stage divides: between the ``|`` of a pattern; a layer each where it has none."""
    return pattern.split('|') if '|' in pattern else [*pattern]


@functools.cache
def even_parts(works: tuple[int, ...], stages: int, last: int) -> tuple[int, ...]:
    """How many neighbouring works each stage gets, at least one: the largest sum is the least.

    Of equally good ones it is one with a small sum of squares.

    Args:
        works: in forward order; at least as many as stages.
        stages: how many.
        last: work of the last stage beside them.
    """
    sums, count = [0, *accumulate(works)], len(works)
    # Works before an end -> the largest stage, the sum of squares, and the ends so far.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(1, stages + 1):
        found = {}
        final = stage == stages
        for end in (count,) if final else range(stage, count - (stages - stage) + 1):
            found[end] = min(
                (max(top, work), squares + work**2, (*ends, end))
                for start, (top, squares, ends) in best.items()
                if start < end
                for work in (sums[end] - sums[start] + final * last,)
            )
        best = found
    ends = (0, *best[count][2])
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
