"""No plan with one operation too few, too many or in the wrong place passes the validator.

What is wrong is decided without the validator: ``execute`` does what a mutated plan says, with
tokens for tensors, on channels that hold one message.
"""

import random
from collections import defaultdict

import pytest

from megatron_mhc.schedules.catalog import forward_only, make_plan
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Kind, fuse
from megatron_mhc.schedules.validator import problems

PLANS = [
    ('gpipe', 3, 2),
    ('1f1b', 4, 5),
    ('interleaved', 2, 4),
    ('interleaved', 3, 3),
    ('zb-h1', 3, 4),
    ('1f1b-overlap', 3, 4),
    ('zb-v', 2, 2),
    ('zb-v', 4, 4),
    ('dualpipev', 2, 6),
    ('dualpipev', 3, 7),
    ('dualpipev-w', 2, 5),
    ('dualpipev-w', 4, 8),
    ('dualpipe', 4, 8),
    ('forward-only', 3, 3),
]
FAR_SWAPS = 200


def lowered(name, pp, m):
    """Every kind of operation that the schedule can have."""
    if name == 'forward-only':
        plan = forward_only(make_plan('zb-v', pp, m).placement, m)
    else:
        plan = make_plan(name, pp, m)
    return lower(plan, recompute=True, param_sync=True)


class Wrong(Exception):
    """The plan did something that an executor cannot do, or that gives wrong gradients."""


class Link:
    def __init__(self):
        self.sent, self.posted, self.taken = [], [], set()


class Machine:
    """One rank: what it holds and what it has done."""

    def __init__(self, plan, rank, kinds, links):
        self.plan, self.rank, self.kinds, self.links = plan, rank, kinds, links
        self.ops = list(plan.ranks[rank])
        self.inputs, self.outputs = set(), set()
        self.forwards, self.live, self.rebuilt = set(), set(), set()
        self.left, self.added = defaultdict(list), defaultdict(list)
        self.reduced, self.gathered = [], []

    def advance(self):
        """Go on until the next wait; whether anything was done."""
        before = len(self.ops)
        while self.ops and self.do(self.ops[0]):
            del self.ops[0]
        return len(self.ops) < before

    def do(self, op):
        if op.kind in (Kind.SEND, Kind.RECV, Kind.WAIT):
            return self.communicate(op)
        if op.kind is Kind.REDUCE:
            self.need(self.complete(op))
            self.reduced.append((op.stage, op.direction))
        elif op.kind is Kind.PARAM_SYNC:
            self.gathered.append((op.stage, op.direction))
        else:
            for part in op.leaves:
                self.start(part)
            for part in op.leaves:
                self.finish(part)
        return True

    def need(self, condition):
        if not condition:
            raise Wrong(f'rank {self.rank} at {self.ops[:1]}')

    def take(self, things, thing):
        self.need(thing in things)
        things.remove(thing)

    def complete(self, op):
        every = list(range(self.plan.microbatches_of(op.direction)))
        return self.added[op.stage, op.direction] == every

    def start(self, op):
        chunk = op.stage, op.direction
        if op.kind is Kind.F:
            self.need(op.key not in self.forwards)
            self.need(Kind.PARAM_SYNC not in self.kinds or chunk in self.gathered)
            if op.stage > 0:
                self.take(self.inputs, ('F', *op.key))
        elif op.kind is Kind.R:
            self.need(op.key in self.live and op.key not in self.rebuilt)
        elif op.kind is Kind.W:
            self.need(self.left[chunk] and self.left[chunk].pop(0) == op.microbatch)
        else:
            self.take(self.live, op.key)
            if Kind.R in self.kinds:
                self.take(self.rebuilt, op.key)
            if op.stage + 1 < self.plan.stages:
                self.take(self.inputs, ('B', *op.key))

    def finish(self, op):
        chunk = op.stage, op.direction
        if op.kind is Kind.F:
            self.forwards.add(op.key)
            self.live.add(op.key)
            self.hand_on(op, 'F', op.stage + 1)
        elif op.kind is Kind.R:
            self.rebuilt.add(op.key)
        elif op.kind is Kind.W:
            self.added[chunk].append(op.microbatch)
        else:
            (self.added if op.kind is Kind.B else self.left)[chunk].append(op.microbatch)
            self.hand_on(op, 'B', op.stage - 1)

    def hand_on(self, op, payload, stage):
        if 0 <= stage < self.plan.stages:
            if self.plan.rank_of(stage, op.direction) == self.rank:
                self.inputs.add((payload, stage, op.microbatch, op.direction))
            else:
                self.outputs.add((payload, *op.key))

    def communicate(self, op):
        """False: it has to wait."""
        ends = (self.rank, self.plan.peer(op))
        stage = op.stage
        if op.kind is not Kind.SEND:
            ends, stage = ends[::-1], stage + (-1 if op.payload == 'F' else 1)
        link = self.links[*ends, op.payload, stage, op.direction]
        if op.kind is Kind.RECV:
            link.posted.append(op.microbatch)
        elif op.kind is Kind.SEND:
            self.need((op.payload, *op.key) in self.outputs)
            if len(link.sent) > len(link.posted):
                return False
            self.outputs.remove((op.payload, *op.key))
            link.sent.append(op.microbatch)
        else:
            self.need(op.microbatch in link.posted and op.microbatch not in link.taken)
            number = link.posted.index(op.microbatch)
            if number >= len(link.sent):
                return False
            self.need(link.sent[number] == op.microbatch)
            link.taken.add(op.microbatch)
            self.inputs.add((op.payload, *op.key))
        return True


def execute(plan, kinds):
    """Whether the plan ends with what one process would have computed.

    Args:
        plan: lowered.
        kinds: of operations that the plan should have.
    """
    links = defaultdict(Link)
    machines = [Machine(plan, rank, kinds, links) for rank in range(plan.pp)]
    try:
        while any([machine.advance() for machine in machines]):
            pass
    except Wrong:
        return False
    return all(map(finished, machines)) and all(
        link.sent == link.posted and link.taken == set(link.sent) for link in links.values()
    )


def finished(machine):
    plan, chunks = machine.plan, list(machine.plan.chunks[machine.rank])
    keys = {(s, mb, d) for s, d in chunks for mb in range(plan.microbatches_of(d))}
    trained = Kind.B in machine.kinds or Kind.I in machine.kinds
    return (
        not (machine.ops or machine.inputs or machine.outputs or machine.rebuilt)
        and machine.forwards == keys
        and machine.live == (set() if trained else keys)
        and all(machine.added[s, d] == [k[1] for k in sorted(keys) if k[::2] == (s, d)]
                for s, d in chunks if trained)
        and sorted(machine.reduced) == (sorted(chunks) if Kind.REDUCE in machine.kinds else [])
        and sorted(machine.gathered) == sorted(chunks)
    )  # fmt: skip


def kinds_of(plan):
    return {op.kind for _, _, op in plan.leaves()}


def edited(plan, rank, ops):
    return plan.with_ranks((*plan.ranks[:rank], tuple(ops), *plan.ranks[rank + 1 :]))


def without_one(plan):
    """Without one operation, or without one part of a fused slot."""
    for rank, ops in enumerate(plan.ranks):
        for n, op in enumerate(ops):
            yield edited(plan, rank, ops[:n] + ops[n + 1 :])
            for part in op.parts:
                yield edited(plan, rank, (*ops[:n], part, *ops[n + 1 :]))


def with_one_twice(plan, chance):
    """The second time at once, and somewhere else; also as a part of another slot."""
    for rank, ops in enumerate(plan.ranks):
        for n, op in enumerate(ops):
            for again in (n, chance.randrange(len(ops) + 1)):
                yield edited(plan, rank, (*ops[:again], op, *ops[again:]))
            if op.kind in (Kind.B, Kind.I):
                f = next((f for f, other in enumerate(ops) if other.kind is Kind.F), None)
                if f is not None:
                    yield edited(plan, rank, (*ops[:f], fuse(ops[f], op), *ops[f + 1 :]))


def swapped(plan, chance):
    """Two neighbours, everywhere, and two operations of one rank far apart, by chance."""
    pairs = [(rank, n, n + 1) for rank, ops in enumerate(plan.ranks) for n in range(len(ops) - 1)]
    for _ in range(FAR_SWAPS):
        rank = chance.randrange(plan.pp)
        pairs.append((rank, *sorted(chance.sample(range(len(plan.ranks[rank])), 2))))
    for rank, a, b in pairs:
        ops = list(plan.ranks[rank])
        ops[a], ops[b] = ops[b], ops[a]
        yield edited(plan, rank, ops)


@pytest.mark.parametrize('name, pp, m', PLANS)
def test_the_plans_are_right(name, pp, m):
    plan = lowered(name, pp, m)
    assert problems(plan) == [] and execute(plan, kinds_of(plan))


@pytest.mark.parametrize('name, pp, m', PLANS)
def test_every_operation_too_few_is_found(name, pp, m):
    plan = lowered(name, pp, m)
    for mutant in without_one(plan):
        assert problems(mutant) and not execute(mutant, kinds_of(plan))


@pytest.mark.parametrize('name, pp, m', PLANS)
def test_every_operation_too_many_is_found(name, pp, m):
    plan = lowered(name, pp, m)
    for mutant in with_one_twice(plan, random.Random(0)):
        assert problems(mutant) and not execute(mutant, kinds_of(plan))


@pytest.mark.parametrize('name, pp, m', PLANS)
def test_every_swap_that_matters_is_found_and_no_other(name, pp, m):
    plan = lowered(name, pp, m)
    kinds = kinds_of(plan)
    right = [0, 0]
    for mutant in swapped(plan, random.Random(0)):
        harmless = execute(mutant, kinds)
        assert (not problems(mutant)) == harmless, mutant.ranks
        right[harmless] += 1
    assert min(right) > 0
