"""A model on the inverted V begins with the weights that 1F1B would give it.

Megatron seeds its generators by pipeline rank, and a rank draws its layers one after the other.
Rank r of 1F1B holds what stages 2 r and 2 r + 1 of a V hold, so stage 2 r is built from the numbers
with which rank r begins, and stage 2 r + 1, on another rank as a rule, from where they then stand.
The states of the generators go from rank to rank while the model is built. When it is, each rank
has those of the same rank of 1F1B, from which dropout goes on.

That holds where rank r of 1F1B has those very layers: with as many on every rank, for example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_mhc.pipeline.random_state import RandomState
from megatron_mhc.schedules.inverted_v import CHUNKS, stage_of

# Of the model that is being built: with which numbers each rank began, and where they stood after
# a stage was built.
_begun: list[RandomState] = []
_left: dict[int, RandomState] = {}


@contextlib.contextmanager
def drawn_as_on_a_line(group: dist.ProcessGroup, chunk: int) -> Iterator[None]:
    """Build chunk 0 or 1 of this rank in the context; all ranks of ``group`` do, in this order.

    Args:
        group: the pipeline-parallel group.
        chunk: which chunk.

    Raises:
        RuntimeError: chunk 1 is built before chunk 0.
    """
    ranks, rank = group.size(), group.rank()
    if chunk == 0:
        _left.clear()
        _begun[:] = _gathered(group, RandomState())
    elif not _begun:
        raise RuntimeError(
            'the second chunk of a V was built before the first one on this rank, so the random '
            'numbers that it begins with are unknown; build chunks in order'
        )
    stage = stage_of(rank, chunk, ranks)
    line, second = divmod(stage, CHUNKS)
    if second:
        # The stage before it is built meanwhile, if it was not in the chunk before.
        _publish(group, None)
        _left[stage - 1].restore()
    else:
        _begun[line].restore()
    yield
    if second:
        _left[stage] = RandomState()
    else:
        _publish(group, stage)
    if chunk == CHUNKS - 1:
        held = {s: _left[s] for c in range(CHUNKS) if (s := stage_of(rank, c, ranks)) % CHUNKS}
        ends = {s: state for mine in _gathered(group, held) for s, state in mine.items()}
        ends[CHUNKS * rank + 1].restore()
        _left.clear()
        _begun.clear()


def _publish(group: dist.ProcessGroup, stage: int | None) -> None:
    """Tell all ranks how the numbers stand after ``stage``; None on a rank that builds later."""
    own = None if stage is None else (stage, RandomState())
    _left.update(filter(None, _gathered(group, own)))


def _gathered[T](group: dist.ProcessGroup, own: T) -> list[T]:
    """What every rank of ``group`` gives, in order."""
    found: list[T | None] = [None] * group.size()
    dist.all_gather_object(found, own, group=group)
    return found  # type: ignore[return-value]
