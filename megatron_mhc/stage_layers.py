"""Which stage a pipeline rank's chunk is, and how many layers it has, for every placement.

Placements are those of ``schedules.catalog``: ``line``, ``interleaved``, and ``v``, in Megatron the
inverted V (``inverted_v_layout``).
"""

from __future__ import annotations

from megatron_mhc.inverted_v_layout import balanced, stage_of


def stage_at(rank: int, chunk: int, ranks: int, placement: str) -> int:
    """The stage, in forward order, held by chunk ``chunk`` of pipeline rank ``rank``."""
    return stage_of(rank, chunk, ranks) if placement == 'v' else chunk * ranks + rank


def layer_counts(layers: int, ranks: int, placement: str, chunks: int) -> list[int]:
    """Layers per stage, as even as they go; the stages with the ends of the model have the least.

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
    counts = [layers // stages] * stages
    # The output layer and the loss weigh more than the embedding.
    order = [*range(1, stages - 1), 0, stages - 1]
    for stage in order[: layers % stages]:
        counts[stage] += 1
    return counts
