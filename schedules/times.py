"""How long each operation of a plan takes: the input of the simulator.

The unit is free: everything is a multiple of it, by default of the forward of one microbatch
through all stages that one rank holds of one model copy (rank-F).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from megatron_mhc.schedules.names import RECOMPUTE_STREAMS
from megatron_mhc.schedules.plan import Kind, Op, Plan


@dataclass(frozen=True)
class Times:
    """Times of one microbatch on a whole rank; a stage takes its share of them.

    Args:
        forward: F.
        input_grad: I, the gradient of the activations.
        weight_grad: W, the gradient of the weights; a B takes I + W.
        recompute: R. A plan without an R for a microbatch does it inside its I or B.
        hop: a tensor's way from one rank to another, from send to arrival.
        reduce: REDUCE, a collective on the communication lane.
        param_sync: PARAM_SYNC, likewise.
        fused_slot_factor: alpha; a fused slot takes alpha times its parts.
        atomic_slots: a fused slot needs both inputs at its start and gives both outputs at its end.
            Otherwise its parts run one after the other.
        link_contention: what one rank sends to another goes one tensor at a time. Otherwise hops
            do not meet.
        recompute_stream: ``compute``, or ``high``: an R runs beside the operations after it.
        stage_scale: per stage, how much longer than an even share it takes; empty for 1 each.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    recompute: float = 0.0
    hop: float = 0.0
    reduce: float = 0.0
    param_sync: float = 0.0
    fused_slot_factor: float = 1.0
    atomic_slots: bool = True
    link_contention: bool = False
    recompute_stream: str = 'compute'
    stage_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == 'float' and not (math.isfinite(value) and value >= 0):
                raise ValueError(f'{field.name}={value}: a time; give a finite number, 0 or more')
        if not self.forward:
            raise ValueError('forward=0: everything is measured against it; give more than 0')
        if not self.fused_slot_factor:
            raise ValueError('fused_slot_factor=0: a slot takes time; 1 is no gain, 0.8 saves 20 %')
        if self.recompute_stream not in RECOMPUTE_STREAMS:
            raise ValueError(
                f'recompute_stream={self.recompute_stream!r}; take one of {RECOMPUTE_STREAMS}'
            )
        wrong = [x for x in self.stage_scale if not (math.isfinite(x) and x > 0)]
        if wrong:
            raise ValueError(f'stage_scale={wrong[0]}: a factor; give finite numbers above 0')


def durations(plan: Plan, times: Times) -> Callable[[Op], float]:
    """A function that tells how long an operation of ``plan`` takes; 0 for SEND, RECV and WAIT.

    Raises:
        ValueError: ``times.stage_scale`` is not one factor a stage.
    """
    if times.stage_scale and len(times.stage_scale) != plan.stages:
        raise ValueError(
            f'stage_scale has {len(times.stage_scale)} factors, the plan {plan.stages} stages: '
            'give one for each stage, in forward order'
        )
    share = {}
    for chunks in plan.chunks:
        for stage, direction in chunks:
            held = sum(other == direction for _, other in chunks)
            share[stage, direction] = (times.stage_scale or (1.0,) * plan.stages)[stage] / held
    recomputed = {op.key for _, _, op in plan.leaves() if op.kind is Kind.R}
    whole = {
        Kind.F: times.forward,
        Kind.I: times.input_grad,
        Kind.W: times.weight_grad,
        Kind.B: times.input_grad + times.weight_grad,
        Kind.R: times.recompute,
        Kind.REDUCE: times.reduce,
        Kind.PARAM_SYNC: times.param_sync,
    }

    def duration(op: Op) -> float:
        if op.kind is Kind.FUSE:
            return times.fused_slot_factor * sum(map(duration, op.parts))
        time = whole.get(op.kind, 0.0)
        if op.kind in (Kind.I, Kind.B) and op.key not in recomputed:
            time += times.recompute
        return time * share[op.stage, op.direction]

    return duration
