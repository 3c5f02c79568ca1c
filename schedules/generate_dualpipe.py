"""DualPipe: two model copies, microbatches from both ends of the pipe (arXiv 2412.19437, 3.2.1)."""

from __future__ import annotations

from megatron_mhc.schedules.generate_v import Rank, eight_steps
from megatron_mhc.schedules.plan import Op


def dualpipe(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """Rank r holds stage r of direction 0 and stage P - 1 - r of direction 1.

    Each direction takes half of the microbatches, counted from 0. The copies are two data-parallel
    replicas: the gradients of a stage's copies are to be summed.
    """
    own, mirror = (rank, 0), (pp - 1 - rank, 1)
    from_end = min(rank, pp - 1 - rank)
    # Chunk 0 is that of the direction that enters at the nearer end.
    this = Rank((own, mirror) if rank < pp // 2 else (mirror, own))
    return eight_steps(this, from_end, pp // 2, microbatches // 2)
