"""Interleaved 1F1B (arXiv 2104.04473, section 2.2): stage = chunk * P + rank."""

from __future__ import annotations

from megatron_mhc.schedules.plan import Kind, Op


def interleaved(rank: int, pp: int, microbatches: int, chunks: int = 2) -> tuple[Op, ...]:
    """Microbatches in groups of P through one chunk after the other, as Megatron orders them.

    Args:
        rank: whose operations.
        pp: pipeline ranks P.
        microbatches: a multiple of P.
        chunks: stages a rank.
    """
    order = [
        (chunk, mb)
        for first in range(0, microbatches, pp)
        for chunk in range(chunks)
        for mb in range(first, first + pp)
    ]
    warmup = min((pp - 1 - rank) * 2 + (chunks - 1) * pp, len(order))
    forward = [Op(Kind.F, chunk * pp + rank, mb) for chunk, mb in order]
    backward = [Op(Kind.B, (chunks - 1 - chunk) * pp + rank, mb) for chunk, mb in order]
    ops = forward[:warmup]
    for f, b in zip(forward[warmup:], backward, strict=False):
        ops += [f, b]
    return (*ops, *backward[len(order) - warmup :])
