"""The schedules by name, what they are, and for which numbers they exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mhc.schedules.generate_dualpipe import dualpipe
from megatron_mhc.schedules.generate_interleaved import interleaved
from megatron_mhc.schedules.generate_line import forward_only, gpipe, one_f_one_b, zb_h1
from megatron_mhc.schedules.generate_v import dualpipev, dualpipev_w, zb_v
from megatron_mhc.schedules.plan import Plan

# (pp, microbatches, chunks) -> what is out of range and what to do, or None.
Check = Callable[[int, int, int], str | None]


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Args:
        name: as on the command line.
        description: one line.
        generate: ``(pp, microbatches, chunks) -> Plan``.
        check: what is wrong with ``(pp, microbatches, chunks)``; None if nothing is.
        source: where it is described.
        splits_backward: whether it runs input and weight gradients apart.
        placement: ``line``, ``interleaved``, ``v`` or ``bidirectional``.
        constraint: for which numbers it exists, in words.
    """

    name: str
    description: str
    generate: Callable[[int, int, int], Plan]
    check: Check
    source: str
    splits_backward: bool = False
    placement: str = 'line'
    constraint: str = ''

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
        lambda pp, m, _: gpipe(pp, m),
        _any,
        'arXiv 1811.06965',
    ),
    Schedule(
        '1f1b',
        'one forward, one backward in turn; stock Megatron',
        lambda pp, m, _: one_f_one_b(pp, m),
        _any,
        'arXiv 2104.04473',
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
        lambda pp, m, _: zb_h1(pp, m),
        _any,
        'arXiv 2401.10241',
        splits_backward=True,
    ),
    Schedule(
        'zb-v',
        'two chunks a rank in a V, no bubble in span if F = I = W',
        lambda pp, m, _: zb_v(pp, m),
        _any,
        'arXiv 2405.15362',
        splits_backward=True,
        placement='v',
    ),
    Schedule(
        'dualpipev',
        'V whose slots run F of one chunk with B of the other',
        lambda pp, m, _: dualpipev(pp, m),
        _twice('dualpipev'),
        'github.com/deepseek-ai/DualPipe',
        splits_backward=True,
        placement='v',
        constraint='m >= 2 pp',
    ),
    Schedule(
        'dualpipev-w',
        'dualpipev with weight gradients after the slot, so that both hops start earlier',
        lambda pp, m, _: dualpipev_w(pp, m),
        _twice('dualpipev-w'),
        'this package',
        splits_backward=True,
        placement='v',
        constraint='m >= 2 pp',
    ),
    Schedule(
        'dualpipe',
        'two model copies, microbatches from both ends',
        lambda pp, m, _: dualpipe(pp, m),
        _bidirectional,
        'arXiv 2412.19437',
        splits_backward=True,
        placement='bidirectional',
        constraint='pp and m even, m >= 2 pp',
    ),
    Schedule(
        'forward-only',
        'evaluation, one stage a rank',
        lambda pp, m, _: forward_only((tuple(range(pp)),), m),
        _any,
        'this package',
    ),
)
SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in _ALL}


def obstacle(name: str, pp: int, microbatches: int, *, chunks: int = 2) -> str | None:
    """Why a schedule does not exist for these numbers and what to use instead; None if it does."""
    if name not in SCHEDULES:
        return f'schedule {name!r}: no such schedule; there are {", ".join(SCHEDULES)}'
    if pp < 1:
        return f'pp = {pp}: at least one pipeline rank is needed'
    if microbatches < 1:
        return f'microbatches = {microbatches}: at least one is needed'
    return SCHEDULES[name].check(pp, microbatches, chunks)


def make_plan(name: str, pp: int, microbatches: int, *, chunks: int = 2) -> Plan:
    """The plan of one step, computation only (``lowering`` places communication).

    Args:
        name: one of ``SCHEDULES``.
        pp: pipeline ranks P.
        microbatches: m of one step.
        chunks: model chunks a rank; for ``interleaved`` only.

    Raises:
        ValueError: the schedule does not exist for these numbers; says what to use instead.
    """
    reason = obstacle(name, pp, microbatches, chunks=chunks)
    if reason is not None:
        raise ValueError(reason)
    return SCHEDULES[name].generate(pp, microbatches, chunks)
