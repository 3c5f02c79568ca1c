"""The inverted V: which pipeline rank and chunk hold which stage, and how layers are divided.

Rank r of P holds stage P - 1 - r as its first chunk and stage P + r as its second. The last rank
thus holds both ends of the model, and "last pipeline rank, last chunk" is the true last stage: all
that Megatron does with losses, final norm, token counts and logging there stays as it is. Only the
first stage has moved, from the first pipeline rank to the last.
"""

from __future__ import annotations

import itertools
import re

CHUNKS = 2
_FLAG = '--pipeline-model-parallel-layout'
# Characters of a layout when its multiplications are written out; no model has so many layers.
_LONGEST = 100_000
# ``(tt|)*3`` and ``t*4``, innermost first, as Megatron reads them.
_TIMES = (re.compile(r'\(([^()]+)\)\*(\d+)'), re.compile(r'(.)\*(\d+)'))


def stage_of(rank: int, chunk: int, ranks: int) -> int:
    """The stage held by chunk 0 or 1 of pipeline rank ``rank`` of ``ranks``."""
    return ranks + rank if chunk else ranks - 1 - rank


def holder_of(stage: int, ranks: int) -> tuple[int, int]:
    """``(rank, chunk)`` that hold ``stage``; the inverse of ``stage_of``."""
    return (stage - ranks, 1) if stage >= ranks else (ranks - 1 - stage, 0)


def by_chunk_and_rank[T](stages: list[T], ranks: int) -> list[T]:
    """``stages``, first to last in forward order, in the order in which Megatron counts them."""
    places = itertools.product(range(CHUNKS), range(ranks))
    return [stages[stage_of(rank, chunk, ranks)] for chunk, rank in places]


def even_layout(
    layers: int,
    ranks: int,
    first: str = 'E',
    last: str = 'L',
    first_extra: int = 0,
    last_extra: int = 0,
    first_layers: int | None = None,
    last_layers: int | None = None,
) -> str:
    """The layout that gives each of the 2 P stages the same load.

    Args:
        layers: decoder layers of the model.
        ranks: pipeline ranks P.
        first: what stands before the first stage's layers, the embedding.
        last: what stands after the last stage's layers: prediction layers and the loss.
        first_extra: layers that the embedding counts for.
        last_extra: layers that the output layer and the loss count for.
        first_layers: of the first stage, where it has a number of its own.
        last_layers: of the last stage, likewise.

    Raises:
        ValueError: the layers do not divide; the message has a layout that works.
    """
    stages = CHUNKS * ranks
    if first_layers is not None or last_layers is not None:
        return written(_between(layers, stages, first_layers, last_layers), first, last)
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


def _between(layers: int, stages: int, first: int | None, last: int | None) -> list[int]:
    """Layers per stage, with ``first`` and ``last`` in those of the ends, and even between."""
    own = [count for count in (first, last) if count is not None]
    left, middle = layers - sum(own), stages - len(own)
    if min(*own, left) < 0 or left % middle:
        raise ValueError(
            f'--num-layers {layers}: less the layers of --decoder-first-pipeline-num-layers '
            f'{first} and --decoder-last-pipeline-num-layers {last}, {left} layers do not divide '
            f'evenly into the other {middle} stages of a V; change them, or name the layers with '
            f'{_FLAG}'
        )
    counts = [left // middle] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


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


def check_layout(layout: str, ranks: int, layers: int | None, prediction_layers: int) -> None:
    """Raise for a layout that a V on ``ranks`` pipeline ranks cannot have.

    Args:
        layout: one entry a stage in forward order, in Megatron's notation.
        ranks: P; the layout has 2 P stages.
        layers: decoder layers of the model; None where a checkpoint will say.
        prediction_layers: of multi-token prediction.

    Raises:
        ValueError: names the flag, what is wrong and a layout that works.
    """
    last = 'm' * prediction_layers + 'L'
    example = written(balanced(max(layers or 0, CHUNKS * ranks), ranks), last=last)
    remedy = f'give {CHUNKS * ranks} stages separated by |, such as {example}'
    if layers is not None and layers < CHUNKS * ranks:
        remedy += f' for {CHUNKS * ranks} layers'
    wrong = _wrong(written_out(layout), ranks, layers, prediction_layers)
    if wrong is not None:
        raise ValueError(f'{_FLAG} {layout}: {wrong}; {remedy}')


def written_out(layout: str) -> str:
    """``layout`` without commas and multiplications.

    Raises:
        ValueError: it is longer than any model has layers.
    """
    found = layout.replace(',', '')
    for pattern in _TIMES:
        # A number of many digits is not even read.
        parts = [(len(part), int(times[:9])) for part, times in pattern.findall(found)]
        if sum(size * times for size, times in parts) > _LONGEST:
            raise ValueError(
                f'{_FLAG} {layout}: longer than {_LONGEST} layers and stages; give smaller factors'
            )
        found = pattern.sub(lambda match: match[1] * int(match[2]), found)
    return found


def _wrong(layout: str, ranks: int, layers: int | None, prediction_layers: int) -> str | None:
    odd = sorted(set(layout) - set('EtmL|'))
    if odd:
        return (
            f'{odd[0]!r} is no layer: E is the embedding, t a layer, m a prediction layer, L loss'
        )
    stages = layout.split('|')
    if len(stages) != CHUNKS * ranks:
        return f'{len(stages)} stages, but a V on {ranks} pipeline ranks has {CHUNKS * ranks}'
    if layout.count('E') != 1 or layout[0] != 'E':
        return 'the embedding E stands once, at the beginning'
    if layout.count('L') != 1 or layout[-1] != 'L':
        return 'the loss L stands once, at the end'
    if layers is not None and layout.count('t') != layers:
        return f'{layout.count("t")} layers t, but --num-layers {layers}'
    if layout.count('m') != prediction_layers:
        return f'{layout.count("m")} prediction layers m, but --mtp-num-layers {prediction_layers}'
    with_m = [number for number, stage in enumerate(stages) if 'm' in stage]
    if len(with_m) > 1:
        return 'all prediction layers m belong to one stage'
    if with_m and (with_m[0] < ranks or 't' in layout[layout.index('m') :]):
        return 'prediction layers m come after all layers t, in the second half of the V'
    return None
