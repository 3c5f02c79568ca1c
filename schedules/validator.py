"""Proof that a plan can run and computes what one process would, before it runs.

A plan that passes cannot hang with one channel per (peer, kind, chunk), whatever the speed of ranks
and links: ``validate_execution`` says what is assumed of a channel.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_mhc.schedules.plan import Kind, Plan
from megatron_mhc.schedules.validate_execution import stuck
from megatron_mhc.schedules.validate_index import Index
from megatron_mhc.schedules.validate_messages import messages, queues
from megatron_mhc.schedules.validate_passes import (
    accumulation,
    collectives,
    passes,
    repetitions,
    slots,
)
from megatron_mhc.schedules.validate_sense import senseless, wrong_placement

# Findings in one error; a plan that is wrong is usually wrong in many places.
SHOWN = 3


class PlanError(ValueError):
    """A plan that must not run."""


def validate(
    plan: Plan, *, live_bound: float | None = None, ranks: Collection[int] | None = None
) -> None:
    """Raise for a plan that must not run.

    Args:
        plan: computations only, or lowered.
        live_bound: most activations that a rank may hold, in whole forward passes of a rank.
        ranks: look at these only, whose operations a part of a plan has. That none of them waits
            for ever is then left unproved, and so is the other end of channels to other ranks.

    Raises:
        PlanError: names rank, operation and peer of the first findings.
    """
    found = problems(plan, live_bound=live_bound, ranks=ranks)
    if found:
        more = f' (and {len(found) - SHOWN} more)' if len(found) > SHOWN else ''
        raise PlanError(
            f'plan {plan.schedule} for {plan.pp} ranks and {plan.microbatches} microbatches is '
            f'invalid: {"; ".join(found[:SHOWN])}{more}'
        )


def problems(
    plan: Plan, *, live_bound: float | None = None, ranks: Collection[int] | None = None
) -> list[str]:
    """Everything that is wrong with ``plan``, one line each; empty for a valid plan.

    Args:
        plan: computations only, or lowered; one message makes it a lowered plan, with all of them.
        live_bound, ranks: as for ``validate``.
    """
    found = wrong_placement(plan)
    if found:
        return found
    index = Index(plan, ranks)
    found = senseless(index)
    if found:
        return found
    checks = [repetitions, passes, accumulation, slots, collectives]
    if index.lowered:
        checks += [messages, queues]
    found = [finding for check in checks for finding in check(index)]
    # What is missing makes others wait: no use in saying that too.
    if index.whole and not found:
        found = stuck(index)
    if live_bound is not None:
        found += [
            f'rank {rank} holds {live:g} activations at once, more than {live_bound:g}'
            for rank, live in enumerate(live_activations(plan))
            if live > live_bound
        ]
    return found


def live_activations(plan: Plan) -> tuple[float, ...]:
    """Per rank the most activations it holds at once, in whole forward passes of a rank.

    An activation lives from its F to its B, or to its W where the backward is split; in a plan
    without a backward, during its F only.
    """
    chunk = plan.pp / plan.stages
    forward_only = plan.forward_only
    peaks = []
    for ops in plan.ranks:
        live = peak = 0
        for op in ops:
            live += sum(leaf.kind is Kind.F for leaf in op.leaves)
            peak = max(peak, live)
            ends = (Kind.F,) if forward_only else (Kind.B, Kind.W)
            live -= sum(leaf.kind in ends for leaf in op.leaves)
        peaks.append(peak * chunk)
    return tuple(peaks)
