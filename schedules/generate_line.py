"""Schedules on a line, one stage a rank: GPipe, 1F1B and its kin, evaluation on any placement."""

from __future__ import annotations

from collections.abc import Collection

from megatron_mhc.schedules.plan import Kind, Op, Plan

Placement = tuple[tuple[int, ...], ...]


def gpipe(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """All forward passes, then all backward passes (arXiv 1811.06965)."""
    return tuple(Op(kind, rank, mb) for kind in (Kind.F, Kind.B) for mb in range(microbatches))


def one_f_one_b(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """1F1B (arXiv 2104.04473): rank r starts with P - 1 - r forward passes."""
    warmup = min(pp - 1 - rank, microbatches)
    ops = [Op(Kind.F, rank, mb) for mb in range(warmup)]
    for mb in range(microbatches - warmup):
        ops += [Op(Kind.F, rank, warmup + mb), Op(Kind.B, rank, mb)]
    return (*ops, *(Op(Kind.B, rank, mb) for mb in range(microbatches - warmup, microbatches)))


def one_f_one_b_overlap(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """1F1B whose gradients leave ahead of the weight gradients, which the hops then lie behind.

    Of two neighbours each waits for what the other makes between two of its weight gradients: 1F1B
    waits for the hops there and back, in every microbatch. This one does not while two hops are no
    longer than one W. Every rank holds the activations that it does under 1F1B.
    """
    ops: list[Op] = []
    for op in one_f_one_b(rank, pp, microbatches):
        split = (Kind.I, Kind.W) if op.kind is Kind.B else (op.kind,)
        ops += [op._replace(kind=kind) for kind in split]
    return tuple(ops)


def zb_h1(rank: int, pp: int, microbatches: int) -> tuple[Op, ...]:
    """ZB-H1 (arXiv 2401.10241, section 2.1): 1F1B whose rank r runs its W r microbatches late.

    No rank holds more activations than rank 0 does under 1F1B.
    """
    warmup = min(pp - 1 - rank, microbatches)
    ops = [Op(Kind.F, rank, mb) for mb in range(warmup)]
    for mb in range(microbatches):
        if warmup + mb < microbatches:
            ops.append(Op(Kind.F, rank, warmup + mb))
        ops.append(Op(Kind.I, rank, mb))
        if mb >= rank:
            ops.append(Op(Kind.W, rank, mb - rank))
    late = range(max(0, microbatches - rank), microbatches)
    return (*ops, *(Op(Kind.W, rank, mb) for mb in late))


def forward_only(
    placement: Placement, microbatches: int, *, only: Collection[int] | None = None
) -> Plan:
    """Evaluation: every microbatch through every stage, on any placement of one model copy.

    Args:
        placement: ``placement[0][stage]`` is the rank that holds the stage.
        microbatches: m >= 1.
        only: the ranks whose operations are wanted; all of them by default.

    Raises:
        ValueError: two model copies.
    """
    if len(placement) != 1:
        raise ValueError(
            f'{len(placement)} model copies: evaluate one of them, forward_only(placement[:1], m)'
        )
    pp = max(placement[0]) + 1
    ranks = tuple(
        _evaluation(rank, placement[0], microbatches) if only is None or rank in only else ()
        for rank in range(pp)
    )
    return Plan('forward-only', microbatches, placement, ranks)


def _evaluation(rank: int, holders: tuple[int, ...], microbatches: int) -> tuple[Op, ...]:
    chunks = len(holders) // (max(holders) + 1)
    # Stage s is due s steps after stage 0, and a rank takes one step a chunk for each microbatch.
    due = sorted(
        (chunks * mb + stage, stage, mb)
        for stage, holder in enumerate(holders)
        if holder == rank
        for mb in range(microbatches)
    )
    return tuple(Op(Kind.F, stage, mb) for _, stage, mb in due)
