"""Two copies of a model on one pipeline: which rank and chunk hold which stage of which copy.

Rank r of P holds stage r of copy 0, whose microbatches enter at rank 0, and stage P - 1 - r of copy
1, whose microbatches enter at the last rank. Its chunk 0 is the earlier of the two stages and its
chunk 1 the later one, so that the same chunks of ranks r and P - 1 - r are the copies of one stage,
and that "chunk 0" is the first stage and "chunk 1" the last one on both ends.
"""

from __future__ import annotations

from megatron_mhc.schedules.inverted_v import CHUNKS, written

_FLAG = '--pipeline-model-parallel-layout'


def mirror_of(rank: int, ranks: int) -> int:
    """The rank that holds the other copies of a rank's stages."""
    return ranks - 1 - rank


def stage_of(rank: int, chunk: int, ranks: int) -> int:
    """The stage held by chunk 0 or 1 of pipeline rank ``rank`` of ``ranks``."""
    return (max if chunk else min)(rank, mirror_of(rank, ranks))


def chunk_of(stage: int, ranks: int) -> int:
    """The chunk that a stage is, on both ranks that hold it."""
    return int(stage >= ranks // CHUNKS)


def copy_of(rank: int, chunk: int, ranks: int) -> int:
    """The copy that a chunk belongs to: 0 where its stage has the number of its rank."""
    return int(stage_of(rank, chunk, ranks) != rank)


def doubled(layout: str) -> str:
    """A layout with the stages of both copies, one copy behind the other."""
    return f'{layout}|{layout}'


def single(layout: str) -> str:
    """The layout of which ``doubled`` makes ``layout``, or ``layout`` if that is none of its."""
    half = len(layout) // 2
    return layout[:half] if layout == doubled(layout[:half]) else layout


def mirrored_layout(
    layout: str | None, layers: int | None, ranks: int, first: int | None, last: int | None
) -> str:
    """The layers of every stage of one copy, in Megatron's notation: ``Et|tt|tt|tL``.

    Args:
        layout: one entry a stage, first to last; None for as many layers on each.
        layers: decoder layers of the model.
        ranks: P, as many as stages.
        first: layers of the first stage, where it has a number of its own.
        last: of the last stage, likewise.

    Raises:
        ValueError: names the flag, what is wrong and a layout that works.
    """
    if layout is not None:
        layout = single(layout)
        if layout.count('|') + 1 != ranks:
            raise ValueError(
                f'{_FLAG} {layout}: {layout.count("|") + 1} stages, but each copy has one on each '
                f'of {ranks} pipeline ranks; give {ranks} stages separated by |'
            )
        return layout
    if layers is None:
        raise ValueError(
            '--pipeline-schedule dualpipe divides the layers before a checkpoint is read: give '
            f'--num-layers or {_FLAG}'
        )
    own = {0: first, ranks - 1: last}
    counts = [own.get(stage) for stage in range(ranks)]
    left = layers - sum(count or 0 for count in counts)
    even = counts.count(None)
    if left < 0 or (left % even if even else left):
        raise ValueError(
            f'--num-layers {layers} does not divide evenly into the {ranks} stages of a copy; name '
            f"them, for example {_FLAG} '{_example(layers, ranks)}'"
        )
    return written([left // even if count is None else count for count in counts])


def _example(layers: int, ranks: int) -> str:
    least, more = divmod(layers, ranks)
    # The ends, with embedding and loss on one rank, have the least.
    order = sorted(range(ranks), key=lambda stage: -min(stage, mirror_of(stage, ranks)))
    counts = [least + (order.index(stage) < more) for stage in range(ranks)]
    return written(counts)
