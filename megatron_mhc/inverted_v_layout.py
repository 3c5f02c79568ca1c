"""The inverted V: which pipeline rank and chunk hold which stage, and how layers are divided.

Rank r of P holds stage P - 1 - r as its first chunk and stage P + r as its second. The last rank
thus holds both ends of the model, and "last pipeline rank, last chunk" is the true last stage: all
that Megatron does with losses, final norm, token counts and logging there stays as it is. Only the
first stage has moved, from the first pipeline rank to the last.
"""

from __future__ import annotations

CHUNKS = 2


def stage_of(rank: int, chunk: int, ranks: int) -> int:
    """The stage held by chunk 0 or 1 of pipeline rank ``rank`` of ``ranks``."""
    return ranks + rank if chunk else ranks - 1 - rank


def holder_of(stage: int, ranks: int) -> tuple[int, int]:
    """``(rank, chunk)`` that hold ``stage``; the inverse of ``stage_of``."""
    return (stage - ranks, 1) if stage >= ranks else (ranks - 1 - stage, 0)


def even_layout(
    layers: int,
    ranks: int,
    first: str = 'E',
    last: str = 'L',
    first_extra: int = 0,
    last_extra: int = 0,
) -> str:
    """The layout that gives each of the 2 P stages the same load.

    Args:
        layers: decoder layers of the model.
        ranks: pipeline ranks P.
        first: what stands before the first stage's layers, the embedding.
        last: what stands after the last stage's layers: prediction layers and the loss.
        first_extra: layers that the embedding counts for.
        last_extra: layers that the output layer and the loss count for.

    Raises:
        ValueError: the layers do not divide; the message has a layout that works.
    """
    stages = CHUNKS * ranks
    total = layers + first_extra + last_extra
    if layers < stages or total % stages:
        if layers < stages:
            remedy = f'use at most {layers // CHUNKS} pipeline ranks'
        else:
            example = written(balanced(layers, ranks), first, last)
            remedy = f"name them, for example --pipeline-model-parallel-layout '{example}'"
        raise ValueError(
            f'--num-layers {layers} does not divide evenly into the {stages} stages of a V on '
            f'{ranks} pipeline ranks; {remedy}'
        )
    counts = [total // stages] * stages
    counts[0] -= first_extra
    counts[-1] -= last_extra
    return written(counts, first, last)


def balanced(layers: int, ranks: int) -> list[int]:
    """Layers per stage, as even as they go; the end rank, with embedding and loss, has the least.

    Layers that are left over go to whole ranks first, from the turn (rank 0) towards the end rank.
    """
    stages = CHUNKS * ranks
    counts = [layers // stages] * stages
    for extra in range(layers % stages):
        counts[stage_of(extra // CHUNKS, extra % CHUNKS, ranks)] += 1
    return counts


def written(counts: list[int], first: str = 'E', last: str = 'L') -> str:
    """A layout in Megatron's notation, one entry a stage in forward order: ``Et|tt|tt|tL``."""
    stages = ['t' * count for count in counts]
    return first + '|'.join(stages) + last
