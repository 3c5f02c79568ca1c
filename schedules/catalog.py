"""The schedules by name, what they are, and for which numbers they exist."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron_mhc.schedules.generate_bounded import bound_obstacle, v_bound, v_half, v_min
from megatron_mhc.schedules.generate_dualpipe import dualpipe
from megatron_mhc.schedules.generate_interleaved import interleaved
from megatron_mhc.schedules.generate_line import (
    Placement,
    forward_only,
    gpipe,
    one_f_one_b,
    one_f_one_b_overlap,
    zb_h1,
)
from megatron_mhc.schedules.generate_v import dualpipev, dualpipev_w, zb_v
from megatron_mhc.schedules.plan import Op, Plan

# (pp, microbatches, chunks) -> what is out of range and what to do, or None.
Check = Callable[[int, int, int], str | None]
# (rank, pp, microbatches, chunks) -> what the rank does; where one is given, within a bound.
Operations = Callable[..., tuple[Op, ...]]

# Forward passes of a plan, all ranks together: P = 256 with m = 2048 and two chunks a rank.
MOST_PASSES = 2**20


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Args:
        name: as on the command line.
        description: one line.
        operations: of one rank, ``(rank, pp, microbatches, chunks)``, and ``live_bound`` where it
            is given; None where they follow from the placement, as in evaluation.
        check: what is wrong with ``(pp, microbatches, chunks)``; None if nothing is.
        source: where it is described.
        placement: ``line``, ``interleaved``, ``v`` or ``bidirectional``.
        constraint: for which numbers it exists, in words.
        bounded: whether it is made for a bound on the microbatches in flight.
    """

    name: str
    description: str
    operations: Operations | None
    check: Check
    source: str
    placement: str = 'line'
    constraint: str = ''
    bounded: bool = False

    @property
    def chunks(self) -> int | None:
        """Model chunks that a rank holds; None where the caller chooses."""
        return {'line': 1, 'v': 2, 'bidirectional': 2}.get(self.placement)


def _any(pp: int, microbatches: int, chunks: int) -> None:
    return None


def _twice(name: str) -> Check:
    def check(pp: int, microbatches: int, chunks: int) -> str | None:
        if microbatches >= 2 * pp:
            return None
        return (
            f'{name} needs at least 2 x pp = {2 * pp} microbatches, got {microbatches}: use zb-v '
            'or 1f1b, or more microbatches'
        )

    return check


def _bidirectional(pp: int, microbatches: int, chunks: int) -> str | None:
    # The count first: dualpipev, which the other two lead to, has it too.
    few = _twice('dualpipe')(pp, microbatches, chunks)
    if few is None and pp % 2:
        return f'dualpipe needs an even number of ranks, got {pp}: use dualpipev'
    if few is None and microbatches % 2:
        return f'dualpipe needs an even number of microbatches, got {microbatches}: use dualpipev'
    return few


def _groups(pp: int, microbatches: int, chunks: int) -> str | None:
    if chunks < 2:
        return f'interleaved needs at least 2 chunks a rank, got {chunks}: use 1f1b'
    if microbatches % pp:
        return (
            f'interleaved takes microbatches in groups of pp = {pp}, got {microbatches}: use a '
            'multiple, or 1f1b or zb-v'
        )
    return None


_ALL = (
    Schedule(
        'gpipe',
        'all forward passes, then all backward passes',
        lambda rank, pp, m, _: gpipe(rank, pp, m),
        _any,
        'arXiv 1811.06965',
    ),
    Schedule(
        '1f1b',
        'one forward, one backward in turn; stock Megatron',
        lambda rank, pp, m, _: one_f_one_b(rank, pp, m),
        _any,
        'arXiv 2104.04473',
    ),
    Schedule(
        '1f1b-overlap',
        '1F1B whose gradients leave ahead of its weight gradients, which hide the hops',
        lambda rank, pp, m, _: one_f_one_b_overlap(rank, pp, m),
        _any,
        'this package',
    ),
    Schedule(
        'interleaved',
        '1F1B over several chunks a rank; stock Megatron with virtual stages',
        interleaved,
        _groups,
        'arXiv 2104.04473',
        placement='interleaved',
        constraint='m a multiple of pp, at least 2 chunks',
    ),
    Schedule(
        'zb-h1',
        '1F1B with weight gradients in its bubbles, at the memory of 1F1B',
        lambda rank, pp, m, _: zb_h1(rank, pp, m),
        _any,
        'arXiv 2401.10241',
    ),
    Schedule(
        'zb-v',
        'two chunks a rank in a V, no bubble in span if F = I = W',
        lambda rank, pp, m, _: zb_v(rank, pp, m),
        _any,
        'arXiv 2405.15362',
        placement='v',
    ),
    Schedule(
        'v-half',
        'two chunks a rank in a V, half of the microbatches in flight of 1F1B',
        lambda rank, pp, m, _: v_half(rank, pp, m),
        _any,
        'arXiv 2405.15362',
        placement='v',
    ),
    Schedule(
        'v-min',
        'two chunks a rank in a V, a third of the microbatches in flight of 1F1B',
        lambda rank, pp, m, _: v_min(rank, pp, m),
        _any,
        'arXiv 2405.15362',
        placement='v',
    ),
    Schedule(
        'v-bound',
        'two chunks a rank in a V, the least bubble for a bound on microbatches in flight',
        lambda rank, pp, m, _, live_bound=None: v_bound(rank, pp, m, live_bound),
        _any,
        'this package',
        placement='v',
        constraint='any pp and m; the bound at least that of v-min',
        bounded=True,
    ),
    Schedule(
        'dualpipev',
        'V whose slots run F of one chunk with B of the other',
        lambda rank, pp, m, _: dualpipev(rank, pp, m),
        _twice('dualpipev'),
        'github.com/deepseek-ai/DualPipe',
        placement='v',
        constraint='m >= 2 pp',
    ),
    Schedule(
        'dualpipev-w',
        'dualpipev with weight gradients after the slot, so that both hops start earlier',
        lambda rank, pp, m, _: dualpipev_w(rank, pp, m),
        _twice('dualpipev-w'),
        'this package',
        placement='v',
        constraint='m >= 2 pp',
    ),
    Schedule(
        'dualpipe',
        'two model copies, microbatches from both ends',
        lambda rank, pp, m, _: dualpipe(rank, pp, m),
        _bidirectional,
        'arXiv 2412.19437',
        placement='bidirectional',
        constraint='pp and m even, m >= 2 pp',
    ),
    Schedule('forward-only', 'evaluation, one stage a rank', None, _any, 'this package'),
)
SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in _ALL}


def placement_of(kind: str, pp: int, chunks: int = 2) -> Placement:
    """Who holds which stage, by the ``placement`` of a schedule."""
    down = tuple(range(pp))
    return {
        'line': (down,),
        'interleaved': (down * chunks,),
        'v': (down + down[::-1],),
        'bidirectional': (down, down[::-1]),
    }[kind]


def obstacle(
    name: str,
    pp: int,
    microbatches: int,
    *,
    chunks: int = 2,
    live_bound: float | None = None,
) -> str | None:
    """Why a schedule does not exist for these numbers and what to use instead; None if it does."""
    if name not in SCHEDULES:
        return f'schedule {name!r}: no such schedule; there are {", ".join(SCHEDULES)}'
    for what, value in (('pp', pp), ('microbatches', microbatches), ('chunks', chunks)):
        if not isinstance(value, int) or isinstance(value, bool):
            return f'{what} = {value!r}: not a number of anything; give an integer'
    if pp < 1:
        return f'pp = {pp}: at least one pipeline rank is needed'
    if microbatches < 1:
        return f'microbatches = {microbatches}: at least one is needed'
    schedule = SCHEDULES[name]
    if live_bound is not None:
        if not schedule.bounded:
            takes = ', '.join(other.name for other in _ALL if other.bounded)
            return f'a bound of {live_bound:g} has no effect with {name}: use {takes}, or drop it'
        reason = bound_obstacle(pp, live_bound)
        if reason is not None:
            return reason
    return schedule.check(pp, microbatches, chunks)


def too_many(pp: int, microbatches: int, chunks: int) -> str | None:
    """Why nobody makes a plan of so many operations; None if it is not too large."""
    if pp * microbatches * chunks <= MOST_PASSES:
        return None
    return (
        f'{pp} ranks x {microbatches} microbatches x {chunks} chunks are more than {MOST_PASSES} '
        'forward passes: too many to follow singly; give fewer, the bubble does not grow with the '
        'microbatches'
    )


def make_plan(
    name: str,
    pp: int,
    microbatches: int,
    *,
    chunks: int = 2,
    only: Collection[int] | None = None,
    live_bound: float | None = None,
) -> Plan:
    """The plan of one step, computation only (``lowering`` places communication).

    Args:
        name: one of ``SCHEDULES``.
        pp: pipeline ranks P.
        microbatches: m of one step.
        chunks: model chunks a rank; for ``interleaved`` only.
        only: the ranks whose operations are wanted; all of them by default.
        live_bound: most microbatches in flight on a rank, for ``v-bound``; those of ``v-half`` by
            default.

    Raises:
        ValueError: the schedule does not exist for these numbers, or would be larger than anyone
            can follow; says what to use instead.
    """
    reason = obstacle(name, pp, microbatches, chunks=chunks, live_bound=live_bound)
    reason = reason or too_many(pp, microbatches, SCHEDULES[name].chunks or chunks)
    if reason is not None:
        raise ValueError(reason)
    schedule = SCHEDULES[name]
    placement = placement_of(schedule.placement, pp, chunks)
    if schedule.operations is None:
        return forward_only(placement, microbatches, only=only)
    bound = () if live_bound is None else (live_bound,)
    wanted = range(pp) if only is None else only
    ranks = tuple(
        schedule.operations(rank, pp, microbatches, chunks, *bound) if rank in wanted else ()
        for rank in range(pp)
    )
    return Plan(name, microbatches, placement, ranks)
