"""Which stage a pipeline rank's chunk is, and how many layers it has, for every placement.

Placements are those of ``schedules.catalog``: ``line``, ``interleaved``, and ``v``, in Megatron the
inverted V (``inverted_v_layout``).
"""

from __future__ import annotations

from megatron_mhc.schedules.inverted_v import balanced, stage_of


def stage_at(rank: int, chunk: int, ranks: int, placement: str) -> int:
    """The stage, in forward order, held by chunk ``chunk`` of pipeline rank ``rank``."""
    return stage_of(rank, chunk, ranks) if placement == 'v' else chunk * ranks + rank


def layer_counts(layers: int, ranks: int, placement: str, chunks: int) -> list[int]:
    """Layers per stage; where they do not divide, no stage has more than the next whole number.

    The last one, with the output layer and the loss, then has the least.

    Raises:
        ValueError: fewer layers than stages.
    """
    stages = ranks * chunks
    if layers < stages:
        what = f'a V has {stages} stages' if placement == 'v' else f'{stages} stages'
        remedy = f'use at most {layers // chunks} pipeline ranks'
        if placement == 'interleaved':
            remedy += ', or fewer virtual stages'
        raise ValueError(f'{layers} layers on pp = {ranks}: {what}; {remedy}')
    if placement == 'v':
        return balanced(layers, ranks)
    least, left = divmod(layers, stages)
    counts = [least] * stages
    if left:
        # The last stage gives all it can; the first one, with the embedding, comes last.
        fuller = [*range(1, stages - 1), 0][: left + least - 1]
        for stage in fuller:
            counts[stage] += 1
        counts[-1] -= len(fuller) - left
    return counts
