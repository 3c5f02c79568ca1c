"""Runs a validated plan on one pipeline rank.

The plan says what happens in which order; a ``Stage`` does it for one model chunk; a ``Transport``
moves tensors. The executor owns every tensor between them, by what it is (activation or gradient),
stage, microbatch and direction, from the moment it exists until its one consumer takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_mhc.schedules.executor_channels import Key, Transport
from megatron_mhc.schedules.executor_lanes import run_lanes
from megatron_mhc.schedules.executor_streams import Launched
from megatron_mhc.schedules.plan import Kind, Op, Plan

# What a pass hands on: a tensor, or one that a side stream is still producing.
Result = Tensor | Launched[Tensor] | None
# Runs the forward and the backward of a fused slot.
Fused = Callable[[Callable[[], None], Callable[[], None]], object]


class Stage(Protocol):
    """One chunk of the model, for one direction.

    A pass may return ``launch(...)`` of a side stream: it is then sent from that stream, and the
    current stream never waits for it.
    """

    def forward(self, microbatch: int, x: Tensor | None) -> Result:
        """The output for the next stage, without graph. No input on the first stage, no output on
        the last."""

    def backward(self, microbatch: int, grad: Tensor | None) -> Result:
        """Weight gradients, and the gradient of the input for the previous stage."""

    def backward_input(self, microbatch: int, grad: Tensor | None) -> Result:
        """The gradient of the input only."""

    def backward_weight(self, microbatch: int) -> None:
        """The weight gradients that ``backward_input`` left."""

    def recompute(self, microbatch: int) -> None:
        """Rebuild what the forward dropped."""

    def reduce(self) -> None:
        """Start the reduction of the weight gradients, which are complete."""

    def param_sync(self) -> None:
        """Start gathering the parameters, which are about to be used."""


def in_turn(forward: Callable[[], None], backward: Callable[[], None]) -> None:
    """A fused slot whose parts run one after the other."""
    forward()
    backward()


def run_plan(
    plan: Plan,
    rank: int,
    stages: Mapping[tuple[int, int], Stage],
    transport: Transport | None,
    *,
    fused: Fused = run_lanes,
    synchronous: bool = False,
    on_op: Callable[[Op], None] | None = None,
) -> None:
    """Do what ``plan`` lists for ``rank``, in order.

    Args:
        plan: validated and lowered.
        rank: this pipeline rank.
        stages: by ``(stage, direction)``, all that the plan gives to this rank.
        transport: to the other ranks; None where there are none.
        fused: runs the two parts of a fused slot, by default changing between them at every
            ``yield_lane``. Bits do not depend on it.
        synchronous: fused slots in turn and a wait for the device after every operation, to find
            out whether streams make a difference.
        on_op: called before each operation.

    Raises:
        RuntimeError: a message did not arrive, or a tensor was left over; names rank and operation.
        Exception: what a stage raised, with a note of rank and operation.
    """
    missing = [chunk for chunk in plan.chunks[rank] if chunk not in stages]
    if missing:
        raise RuntimeError(f'pipeline rank {rank} has no stage for (stage, direction) {missing}')
    run = _Run(plan, rank, stages, transport, in_turn if synchronous else fused)
    for op in plan.ranks[rank]:
        if on_op is not None:
            on_op(op)
        try:
            with torch.profiler.record_function(str(op)):
                run.do(op)
            if synchronous and torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            error.add_note(f'in operation {op} of plan {plan.schedule} on pipeline rank {rank}')
            raise
    run.finish()


class _Run:
    def __init__(
        self,
        plan: Plan,
        rank: int,
        stages: Mapping[tuple[int, int], Stage],
        transport: Transport | None,
        fused: Fused,
    ) -> None:
        self.plan, self.rank, self.stages, self.transport = plan, rank, stages, transport
        self.fused = fused
        # ('F' or 'B', stage, microbatch, direction) of the consumer -> tensor.
        self.inputs: dict[Key, Tensor | Launched[Tensor]] = {}
        # The same of the producer -> tensor to be sent.
        self.outputs: dict[Key, Tensor | Launched[Tensor]] = {}

    def do(self, op: Op) -> None:
        match op.kind:
            case Kind.F | Kind.B | Kind.I:
                self.compute(op)
            case Kind.FUSE:
                forward, backward = op.parts
                self.fused(lambda: self.compute(forward), lambda: self.compute(backward))
            case Kind.SEND:
                self.send(op)
            case Kind.RECV:
                self.link.receive(op)
            case Kind.WAIT:
                self.inputs[op.payload, *op.key] = self.link.wait(op)
            case Kind.W:
                self.stage(op).backward_weight(op.microbatch)
            case Kind.R:
                self.stage(op).recompute(op.microbatch)
            case Kind.REDUCE:
                self.stage(op).reduce()
            case Kind.PARAM_SYNC:
                self.stage(op).param_sync()

    @property
    def link(self) -> Transport:
        if self.transport is None:
            raise RuntimeError(
                f'plan {self.plan.schedule} has messages; give the transport that carries them'
            )
        return self.transport

    def stage(self, op: Op) -> Stage:
        return self.stages[op.stage, op.direction]

    def compute(self, op: Op) -> None:
        stage = self.stage(op)
        payload = 'F' if op.kind is Kind.F else 'B'
        given = self.inputs.pop((payload, *op.key), None)
        if isinstance(given, Launched):
            given = given.result()
        function = {Kind.F: stage.forward, Kind.B: stage.backward, Kind.I: stage.backward_input}
        result = function[op.kind](op.microbatch, given)
        peer = self.plan.peer(op)
        if (result is None) != (peer is None):
            raise RuntimeError(
                f'pipeline rank {self.rank}, {op}: the stage returned '
                f'{"nothing" if result is None else "a tensor"}, but '
                f'{"a" if result is None else "no"} neighbouring stage takes one'
            )
        if result is None:
            return
        if peer == self.rank:
            onwards = op.stage + (1 if payload == 'F' else -1)
            self.inputs[payload, onwards, op.microbatch, op.direction] = result
        else:
            self.outputs[payload, *op.key] = result

    def send(self, op: Op) -> None:
        result = self.outputs.pop((op.payload, *op.key))
        if isinstance(result, Launched):
            with result.on_its_stream() as tensor:
                self.link.send(op, tensor)
        else:
            self.link.send(op, result)

    def finish(self) -> None:
        if self.transport is not None:
            self.transport.finish()
        left = [*self.inputs, *self.outputs]
        if left:
            raise RuntimeError(
                f'pipeline rank {self.rank}: tensors left over at the end of the plan, by '
                f'(payload, stage, microbatch, direction): {left[:4]}'
            )
