"""Schedules on a line, one stage a rank: GPipe, 1F1B, ZB-H1, and evaluation on any placement."""

from __future__ import annotations

from megatron_mhc.schedules.plan import Kind, Op, Plan

Placement = tuple[tuple[int, ...], ...]


def gpipe(pp: int, microbatches: int) -> Plan:
    """All forward passes, then all backward passes (arXiv 1811.06965)."""
    ranks = []
    for rank in range(pp):
        forward = [Op(Kind.F, rank, mb) for mb in range(microbatches)]
        ranks.append((*forward, *(Op(Kind.B, rank, mb) for mb in range(microbatches))))
    return Plan('gpipe', microbatches, (tuple(range(pp)),), tuple(ranks))


def one_f_one_b(pp: int, microbatches: int) -> Plan:
    """1F1B (arXiv 2104.04473): rank r starts with P - 1 - r forward passes."""
    ranks = []
    for rank in range(pp):
        warmup = min(pp - 1 - rank, microbatches)
        ops = [Op(Kind.F, rank, mb) for mb in range(warmup)]
        for mb in range(microbatches - warmup):
            ops += [Op(Kind.F, rank, warmup + mb), Op(Kind.B, rank, mb)]
        ops += [Op(Kind.B, rank, mb) for mb in range(microbatches - warmup, microbatches)]
        ranks.append(tuple(ops))
    return Plan('1f1b', microbatches, (tuple(range(pp)),), tuple(ranks))


def zb_h1(pp: int, microbatches: int) -> Plan:
    """ZB-H1 (arXiv 2401.10241, section 2.1): 1F1B whose rank r runs its W r microbatches late.

    No rank holds more activations than rank 0 does under 1F1B.
    """
    ranks = []
    for rank in range(pp):
        warmup = min(pp - 1 - rank, microbatches)
        ops = [Op(Kind.F, rank, mb) for mb in range(warmup)]
        for mb in range(microbatches):
            if warmup + mb < microbatches:
                ops.append(Op(Kind.F, rank, warmup + mb))
            ops.append(Op(Kind.I, rank, mb))
            if mb >= rank:
                ops.append(Op(Kind.W, rank, mb - rank))
        late = range(max(0, microbatches - rank), microbatches)
        ranks.append((*ops, *(Op(Kind.W, rank, mb) for mb in late)))
    return Plan('zb-h1', microbatches, (tuple(range(pp)),), tuple(ranks))


def forward_only(placement: Placement, microbatches: int) -> Plan:
    """Evaluation: every microbatch through every stage, on any placement of one model copy.

    Args:
        placement: ``placement[0][stage]`` is the rank that holds the stage.
        microbatches: m >= 1.

    Raises:
        ValueError: two model copies.
    """
    if len(placement) != 1:
        raise ValueError(
            f'{len(placement)} model copies: evaluate one of them, forward_only(placement[:1], m)'
        )
    holders = placement[0]
    pp, stages = max(holders) + 1, len(holders)
    chunks = stages // pp
    # Stage s is due s steps after stage 0, and a rank takes one step a chunk for each microbatch.
    due = sorted(
        (chunks * mb + stage, stage, mb) for stage in range(stages) for mb in range(microbatches)
    )
    ranks = tuple(
        tuple(Op(Kind.F, stage, mb) for _, stage, mb in due if holders[stage] == rank)
        for rank in range(pp)
    )
    return Plan('forward-only', microbatches, placement, ranks)
