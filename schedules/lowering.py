"""Passes that make a plan of computations executable: messages, rebuilding, data parallelism.

Every pass takes a plan and returns a plan. ``lower`` applies those that a step needs, in order. A
pass that places operations refuses a plan that has such operations already.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mhc.schedules.plan import COMMUNICATION, Kind, Op, Plan

# What a computation takes from the neighbouring stage, and gives to the next.
PAYLOAD = {Kind.F: 'F', Kind.B: 'B', Kind.I: 'B'}


def lower(
    plan: Plan, *, recompute: bool = False, reduce: bool = True, param_sync: bool = False
) -> Plan:
    """The plan with everything that the executor does.

    Args:
        plan: computations only.
        recompute: rebuild what each forward dropped, before its backward.
        reduce: start a stage's gradient reduction as soon as it has all its gradients.
        param_sync: start a stage's parameter gather before its first forward pass.

    Raises:
        ValueError: the plan has some of these operations already.
    """
    plan = place_communication(plan)
    if recompute:
        plan = place_recompute(plan)
    if reduce:
        plan = place_reductions(plan)
    return place_param_sync(plan) if param_sync else plan


def place_communication(plan: Plan) -> Plan:
    """Send as soon as a tensor is there, post its receive one computation ahead of the consumer.

    A tensor whose consumer is a stage of the same rank crosses no link and gets no operation.

    Raises:
        ValueError: the plan has messages already.
    """
    _without(plan, COMMUNICATION, 'messages')
    crossing = _crossing(plan)
    ranks = []
    for ops in plan.ranks:
        lowered: list[Op] = []
        # A computation with its waits and sends, which the receives of the next one go before.
        held: list[Op] = []
        for op in ops:
            waits, sends = [], []
            for kind, stage, mb, direction, _, _ in op.leaves:
                payload, receives, gives = crossing[kind, stage, direction]
                if receives:
                    lowered.append(Op(Kind.RECV, stage, mb, direction, payload))
                    waits.append(Op(Kind.WAIT, stage, mb, direction, payload))
                if gives:
                    sends.append(Op(Kind.SEND, stage, mb, direction, payload))
            lowered += held
            held = [*waits, op, *sends]
        ranks.append(lowered + held)
    return _with(plan, ranks)


def _crossing(plan: Plan) -> dict[tuple[Kind, int, int], tuple[str, bool, bool]]:
    """Of a kind and stage: its payload, and whether that crosses ranks before and after."""
    found: dict[tuple[Kind, int, int], tuple[str, bool, bool]] = {}
    for direction, holders in enumerate(plan.placement):
        for stage, here in enumerate(holders):
            for kind in Kind:
                payload = PAYLOAD.get(kind, '')
                before, after = (
                    bool(payload)
                    and plan.peer(Op(message, stage, 0, direction, payload)) not in (None, here)
                    for message in (Kind.RECV, Kind.SEND)
                )
                found[kind, stage, direction] = payload, before, after
    return found


def place_recompute(plan: Plan) -> Plan:
    """Put R before the wait for the gradient of its backward, so that it runs meanwhile.

    What it rebuilds is then alive for one operation only. In a fused slot it goes before the waits
    of both parts.

    Raises:
        ValueError: the plan rebuilds already.
    """
    _without(plan, {Kind.R}, 'operations that rebuild')
    ranks = []
    for ops in plan.ranks:
        lowered: list[Op] = []
        for op in ops:
            waits = _before_waits(lowered)
            lowered[waits:waits] = [
                Op(Kind.R, *leaf.key) for leaf in op.leaves if leaf.kind in (Kind.B, Kind.I)
            ]
            lowered.append(op)
        ranks.append(lowered)
    return _with(plan, ranks)


def place_reductions(plan: Plan) -> Plan:
    """Start the data-parallel reduction of a stage after the last of its weight gradients.

    Raises:
        ValueError: the plan reduces already.
    """
    _without(plan, {Kind.REDUCE}, 'reductions')
    ranks = []
    for rank, ops in enumerate(plan.ranks):
        left = set(plan.chunks[rank])
        lowered = list(ops)
        # From the end, so that what is inserted moves nothing that is still to be looked at.
        for position in reversed(range(len(ops))):
            for leaf in ops[position].leaves:
                chunk = leaf.stage, leaf.direction
                if leaf.kind in (Kind.B, Kind.W) and chunk in left:
                    left.remove(chunk)
                    after = position + 1
                    # The sends of the operation go first: another rank waits for them.
                    while after < len(lowered) and lowered[after].kind is Kind.SEND:
                        after += 1
                    lowered.insert(after, Op(Kind.REDUCE, leaf.stage, direction=leaf.direction))
            if not left:
                break
        ranks.append(lowered)
    return _with(plan, ranks)


def place_param_sync(plan: Plan) -> Plan:
    """Start the parameter gather of a stage before the wait for its first activation.

    Raises:
        ValueError: the plan gathers already.
    """
    _without(plan, {Kind.PARAM_SYNC}, 'parameter gathers')
    ranks = []
    for ops in plan.ranks:
        started: set[tuple[int, int]] = set()
        lowered: list[Op] = []
        for op in ops:
            for leaf in op.leaves:
                chunk = leaf.stage, leaf.direction
                if leaf.kind is Kind.F and chunk not in started:
                    started.add(chunk)
                    gather = Op(Kind.PARAM_SYNC, leaf.stage, direction=leaf.direction)
                    lowered.insert(_before_waits(lowered), gather)
            lowered.append(op)
        ranks.append(lowered)
    return _with(plan, ranks)


def _before_waits(ops: list[Op]) -> int:
    """Where the waits at the end of ``ops`` begin."""
    position = len(ops)
    while position and ops[position - 1].kind is Kind.WAIT:
        position -= 1
    return position


def _with(plan: Plan, ranks: Iterable[list[Op]]) -> Plan:
    return plan.with_ranks(tuple(map(tuple, ranks)))


def _without(plan: Plan, kinds: set[Kind] | frozenset[Kind], what: str) -> None:
    if not plan.kinds.isdisjoint(kinds):
        raise ValueError(f'plan {plan.schedule} has {what} already: lower a plan of computations')
