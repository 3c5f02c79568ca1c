"""What costs are given in: seconds and bytes of a layer, a stage, and a step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class Costs:
    """Seconds, of a microbatch in a layer or a stage on one rank.

    Args:
        forward: compute, with collectives of tensor parallelism, which nothing hides.
        input_grad: I, likewise.
        weight_grad: W.
        recompute: R as an operation of its own, ahead of the backward.
        exchange: all-to-all of experts, in the forward; the backward has as much.
        again: more of it in the backward, under full recomputation.
        collectives: of tensor parallelism, forward and backward; part of the others.
        ring: of context parallelism, what attention does not hide; likewise.
        tensor_bytes: sent in collectives.
        ring_bytes: sent in the ring, forward and backward.
        expert_bytes: sent in the all-to-all, forward and backward.
    """

    forward: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0
    recompute: float = 0.0
    exchange: float = 0.0
    again: float = 0.0
    collectives: float = 0.0
    ring: float = 0.0
    tensor_bytes: float = 0.0
    ring_bytes: float = 0.0
    expert_bytes: float = 0.0

    def add(self, other: Costs, times: int = 1) -> None:
        """Add ``times`` of ``other``."""
        for field in _FIELDS:
            setattr(self, field, getattr(self, field) + times * getattr(other, field))


_FIELDS = tuple(field.name for field in dataclasses.fields(Costs))


@dataclass(frozen=True)
class RankCosts:
    """Once a step, of the rank that waits longest or sends most.

    Args:
        exposed_reduce: seconds of gradient reduction that the backward of the last microbatch does
            not cover.
        gather: seconds of the all-gather of parameters, which nothing covers.
        optimizer: seconds of Adam.
        data_bytes: sent by data parallelism.
    """

    exposed_reduce: float
    gather: float
    optimizer: float
    data_bytes: float
