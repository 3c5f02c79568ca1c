"""Runs a plan on a clock instead of on devices: the same waiting, none of the work.

Each rank does its operations in order on its compute lane. What it sends leaves when everything
before the SEND has been computed and the receive has been posted, and arrives one hop later;
computing goes on meanwhile. Links are full duplex and do not meet unless asked. A plan without
communication is taken as sending each tensor when it is produced. Use the numbers to rank schedules
and to notice regressions, not as promises.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from megatron_mhc.schedules.plan import COLLECTIVE, COMMUNICATION, Kind, Op, Plan
from megatron_mhc.schedules.timeline import (
    COMMUNICATION_LANE,
    COMPUTE_LANE,
    HIGH_LANE,
    Entry,
    Timeline,
)
from megatron_mhc.schedules.times import Times, durations

DEFAULT_TIMES = Times()


def simulate(plan: Plan, times: Times = DEFAULT_TIMES) -> Timeline:
    """When each operation of ``plan`` runs.

    Args:
        plan: compute operations only, or lowered, with its communication.
        times: of one microbatch on a whole rank.

    Raises:
        ValueError: the plan cannot run to its end; names a rank, its operation and what that waits
            for. Or ``times`` do not fit the plan.
    """
    return _Simulation(plan, times).run()


class Fact(NamedTuple):
    """Something that has happened to a stage and microbatch.

    ``what`` is a compute kind (its result is there; B counts as I and W), or of a tensor, named by
    its payload and the stage that consumes it, ``sent``, ``posted``, ``arrived`` or ``usable``.
    """

    what: str
    stage: int
    microbatch: int
    direction: int
    payload: str = ''

    @property
    def producer(self) -> int:
        """The stage that a tensor comes from."""
        return self.stage + (-1 if self.payload == 'F' else 1)


class _Simulation:
    """Events in time order; a rank that cannot go on waits for one fact."""

    def __init__(self, plan: Plan, times: Times) -> None:
        self.plan, self.times = plan, times
        self.duration = durations(plan, times)
        leaves = [op for _, _, op in plan.leaves()]
        self.lowered = any(op.kind in COMMUNICATION for op in leaves)
        self.recomputed = {op.key for op in leaves if op.kind is Kind.R}
        self.synced = {(op.stage, op.direction) for op in leaves if op.kind is Kind.PARAM_SYNC}
        self.programs = [self._program(ops) for ops in plan.ranks]
        self.position = [0] * plan.pp
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.pushed = 0
        self.facts: set[Fact] = set()
        self.waiting: dict[Fact, list[int]] = {}
        self.blocked: dict[int, tuple[Fact, float]] = {}
        self.lane_free: dict[tuple[object, ...], float] = {}
        self.entries: list[Entry] = []
        self.exposed = [0.0] * plan.pp

    def run(self) -> Timeline:
        for rank in range(self.plan.pp):
            self._at(0.0, partial(self._advance, rank))
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
        if self.blocked:
            raise ValueError(self._stuck())
        order = sorted(self.entries, key=lambda entry: (entry.start, entry.rank))
        return Timeline(self.plan, tuple(order), tuple(self.exposed), self.times)

    def _program(self, ops: tuple[Op, ...]) -> list[tuple[Op, float]]:
        """The operations with their times; slots in their parts where they are not atomic."""
        if self.times.atomic_slots:
            return [(op, self.duration(op)) for op in ops]
        factor = self.times.fused_slot_factor
        return [
            (leaf, self.duration(leaf) * (factor if op.parts else 1.0))
            for op in ops
            for leaf in op.leaves
        ]

    def _at(self, time: float, event: Callable[[], None]) -> None:
        # The counter keeps events of one time in the order in which they were made.
        heapq.heappush(self.events, (time, self.pushed, event))
        self.pushed += 1

    def _advance(self, rank: int) -> None:
        """Do what ``rank`` can do now, up to its next computation or wait."""
        program = self.programs[rank]
        while self.position[rank] < len(program):
            op, duration = program[self.position[rank]]
            missing = next((need for need in self._needs(op) if need not in self.facts), None)
            if missing is not None:
                self.waiting.setdefault(missing, []).append(rank)
                self.blocked[rank] = missing, self.now
                return
            self.position[rank] += 1
            if op.kind in COMMUNICATION:
                self._communicate(op)
            elif op.kind in COLLECTIVE:
                self._aside(rank, op, duration, COMMUNICATION_LANE)
            elif op.kind is Kind.R and self.times.recompute_stream == HIGH_LANE:
                self._aside(rank, op, duration, HIGH_LANE)
            else:
                self.entries.append(Entry(rank, op, self.now, self.now + duration, COMPUTE_LANE))
                self._at(self.now + duration, partial(self._computed, rank, op))
                return

    def _needs(self, op: Op) -> list[Fact]:
        """What must have happened before ``op`` starts."""
        if op.parts:
            return [need for part in op.parts for need in self._needs(part)]
        needs = []
        if op.kind is Kind.F:
            if op.stage:
                needs.append(Fact('usable', *op.key, 'F'))
            if (op.stage, op.direction) in self.synced:
                needs.append(Fact(Kind.PARAM_SYNC, op.stage, -1, op.direction))
        elif op.kind in (Kind.I, Kind.B):
            needs.append(Fact(Kind.F, *op.key))
            if op.key in self.recomputed:
                needs.append(Fact(Kind.R, *op.key))
            if op.stage < self.plan.stages - 1:
                needs.append(Fact('usable', *op.key, 'B'))
        elif op.kind is Kind.SEND:
            needs.append(Fact(Kind.F if op.payload == 'F' else Kind.I, *op.key))
        elif op.kind is Kind.WAIT:
            needs.append(Fact('arrived', *op.key, op.payload))
        elif op.kind is Kind.W:
            needs.append(Fact(Kind.I, *op.key))
        elif op.kind is Kind.R:
            needs.append(Fact(Kind.F, *op.key))
        return needs

    def _communicate(self, op: Op) -> None:
        name = Fact('usable', *op.key, op.payload)
        if op.kind is Kind.WAIT:
            self._happened(name)
            return
        if op.kind is Kind.SEND:
            name = name._replace(stage=op.stage + (1 if op.payload == 'F' else -1))
        self._happened(name._replace(what='sent' if op.kind is Kind.SEND else 'posted'))
        if {name._replace(what='sent'), name._replace(what='posted')} <= self.facts:
            self._transfer(name)

    def _transfer(self, name: Fact) -> None:
        """Put a tensor, sent and awaited, on its way."""
        source = self.plan.rank_of(name.producer, name.direction)
        link = source, self.plan.rank_of(name.stage, name.direction)
        start = self.now
        if self.times.link_contention:
            start = max(start, self.lane_free.get(link, 0.0))
        end = self.lane_free[link] = start + self.times.hop
        send = Op(Kind.SEND, name.producer, name.microbatch, name.direction, name.payload)
        self.entries.append(Entry(source, send, start, end, COMMUNICATION_LANE))
        # A lowered plan uses a tensor only after its WAIT.
        arrival = name._replace(what='arrived') if self.lowered else name
        self._at(end, partial(self._arrived, arrival, start))

    def _arrived(self, arrival: Fact, departure: float) -> None:
        for rank in self.waiting.get(arrival, []):
            self.exposed[rank] += self.now - max(self.blocked[rank][1], departure)
        self._happened(arrival)

    def _aside(self, rank: int, op: Op, duration: float, lane: str) -> None:
        """Run ``op`` on another lane, one at a time, while the rank goes on."""
        start = max(self.now, self.lane_free.get((rank, lane), 0.0))
        end = self.lane_free[rank, lane] = start + duration
        self.entries.append(Entry(rank, op, start, end, lane))
        self._at(end, partial(self._happened, Fact(op.kind, *op.key)))

    def _computed(self, rank: int, op: Op) -> None:
        for leaf in op.leaves:
            gives = Kind.I if leaf.kind is Kind.B else leaf.kind
            self._happened(Fact(gives, *leaf.key))
            if gives not in (Kind.F, Kind.I):
                continue
            stage = leaf.stage + (1 if gives is Kind.F else -1)
            if not 0 <= stage < self.plan.stages:
                continue
            payload = 'F' if gives is Kind.F else 'B'
            name = Fact('usable', stage, leaf.microbatch, leaf.direction, payload)
            if self.plan.rank_of(stage, leaf.direction) == rank:
                self._happened(name)
            elif not self.lowered:
                self._transfer(name)
        self._advance(rank)

    def _happened(self, fact: Fact) -> None:
        self.facts.add(fact)
        for rank in self.waiting.pop(fact, []):
            del self.blocked[rank]
            self._at(self.now, partial(self._advance, rank))

    def _stuck(self) -> str:
        """One line about the plan that stands still."""
        found = []
        for rank, (missing, _) in sorted(self.blocked.items()):
            op = self.programs[rank][self.position[rank]][0]
            found.append(f'rank {rank} at {op} waits for {self._describe(missing)}')
        more = f' (and {len(found) - 3} more)' if len(found) > 3 else ''
        return (
            f'{self.plan.schedule} with {self.plan.pp} ranks and {self.plan.microbatches} '
            f'microbatches cannot proceed: {"; ".join(found[:3])}{more}; validate the plan'
        )

    def _describe(self, missing: Fact) -> str:
        _, stage, microbatch, direction, payload = missing
        if not payload:
            op = Op(Kind(missing.what), stage, microbatch, direction)
            return f'{op} of rank {self.plan.rank_of(stage, direction)}'
        received = Op(Kind.RECV, stage, microbatch, direction, payload)
        sent = Op(Kind.SEND, missing.producer, microbatch, direction, payload)
        sender = self.plan.rank_of(missing.producer, direction)
        if missing.what == 'arrived':
            posted = missing._replace(what='posted') in self.facts
            return f'{sent} of rank {sender}' if posted else f'{received} before it'
        if self.lowered and sender != self.plan.rank_of(stage, direction):
            return f'{Op(Kind.WAIT, *received.key, payload)} before it'
        made = Op(Kind.F if payload == 'F' else Kind.I, *sent.key)
        return f'{made} of rank {sender}'
