"""Plans as text and CSV: written, and read back equal.

A line of words, or of comma-separated cells, for each of: ``schedule`` NAME, ``microbatches`` M,
``placement`` and the rank of each stage (a second one for the second model copy), and the
operations of each rank in order, ``3F5 3SEND_F5 (3F6;12B1)FUSE ...``. Where the first three are
left out, as in the CSV files of torch's pipeline schedules, they follow from the forward passes.
A ``#`` begins a comment.

Of torch's own words, ``OVERLAP_F_B`` is a fused slot and ``REDUCE_GRAD`` is ``REDUCE``. Those of
sharded parameters (``UNSHARD``, ``RESHARD``) and waits for what is sent or reduced have no place in
a plan, where ranks hold whole parameters, and are left out. A file without a ``schedule`` line that
receives and never waits gets its waits before each use, as torch does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_mhc.schedules.catalog import MOST_PASSES
from megatron_mhc.schedules.lowering import PAYLOAD
from megatron_mhc.schedules.plan import Kind, Op, Plan

# What torch writes and a plan has not; its other words, and ours.
_ABSENT = re.compile(r'\d+(UNSHARD|RESHARD|WAIT_REDUCE_GRAD|WAIT_SEND_[FB]\d+)')
_WORDS = {'OVERLAP_F_B': 'FUSE', 'REDUCE_GRAD': 'REDUCE'}
_UNNAMED = 'from a file'


def write_text(plan: Plan) -> str:
    """``plan`` in words."""
    return _write(plan, ' ')


def write_csv(plan: Plan) -> str:
    """``plan`` as comma-separated cells, a row for each rank."""
    return _write(plan, ',')


def _write(plan: Plan, separator: str) -> str:
    lines: list[tuple[object, ...]] = [
        ('schedule', plan.schedule),
        ('microbatches', plan.microbatches),
    ]
    lines += [('placement', *holders) for holders in plan.placement]
    lines += [ops or ('-',) for ops in plan.ranks]
    return ''.join(separator.join(map(str, line)) + '\n' for line in lines)


def read_plan(text: str) -> Plan:
    """The plan that ``write_text`` or ``write_csv`` wrote, or a person; not validated.

    Raises:
        ValueError: not a plan; names the line.
    """
    names: list[str] = []
    counts: list[int] = []
    holders: list[tuple[int, ...]] = []
    ranks: list[tuple[Op, ...]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = [word for word in re.split(r'[,\s]+', line.partition('#')[0]) if word]
        try:
            if words and words[0] == 'schedule':
                names.append(_once(' '.join(words[1:]), names, 'schedule'))
            elif words and words[0] == 'microbatches':
                counts.append(_once(_count(words[1:]), counts, 'microbatches'))
            elif words and words[0] == 'placement':
                holders.append(_holders(words[1:], holders))
            elif words:
                ranks.append(tuple(_operations(words)))
        except ValueError as error:
            raise ValueError(f'line {number}: {error}') from error
    if not any(ranks):
        raise ValueError('no operations; give a line for each rank, such as 0F0 0F1 0B0 0B1')
    placement = tuple(holders) or _placement(ranks)
    if not all(rank < len(ranks) for held in placement for rank in held):
        raise ValueError(f'placement: names a rank that has no operations; there are {len(ranks)}')
    _check_stages(ranks, placement)
    microbatches = counts[0] if counts else _microbatches(ranks)
    if microbatches * len(placement[0]) > MOST_PASSES:
        raise ValueError(
            f'microbatches {microbatches}: through {len(placement[0])} stages they are more than '
            f'{MOST_PASSES} forward passes, too many to follow singly; give fewer'
        )
    plan = Plan(names[0] if names else _UNNAMED, microbatches, placement, tuple(ranks))
    if names or Kind.RECV not in plan.kinds or Kind.WAIT in plan.kinds:
        return plan
    return plan.with_ranks(tuple(map(_with_waits, plan.ranks)))


def _operations(words: list[str]) -> Iterator[Op]:
    for word in words:
        for theirs, ours in _WORDS.items():
            if word.endswith(theirs) and not _ABSENT.fullmatch(word):
                word = word.removesuffix(theirs) + ours
        if word != '-' and not _ABSENT.fullmatch(word):
            yield Op.parse(word)


def _with_waits(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Each receive waited for by the operation that uses what it brings."""
    posted = {(op.payload, *op.key) for op in ops if op.kind is Kind.RECV}
    found: list[Op] = []
    for op in ops:
        for leaf in op.leaves:
            payload = PAYLOAD.get(leaf.kind, '')
            if (payload, *leaf.key) in posted:
                found.append(Op(Kind.WAIT, *leaf.key, payload))
        found.append(op)
    return tuple(found)


def _once[T](value: T, earlier: list[T], name: str) -> T:
    if earlier:
        raise ValueError(f'{name}: stands twice; give it once')
    return value


def _count(words: list[str]) -> int:
    numbers = _numbers('microbatches', words)
    if len(numbers) != 1 or numbers[0] < 1:
        raise ValueError('microbatches: give one number, at least 1')
    return numbers[0]


def _holders(words: list[str], earlier: list[tuple[int, ...]]) -> tuple[int, ...]:
    holders = _numbers('placement', words)
    if len(earlier) > 1 or any(len(other) != len(holders) for other in earlier):
        raise ValueError('placement: give one line, or two of the same length for two model copies')
    return holders


def _numbers(name: str, words: list[str]) -> tuple[int, ...]:
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f'{" ".join([name, *words])}: give integers of 0 or more')
    return tuple(map(int, words))


def _forwards(ranks: list[tuple[Op, ...]]) -> dict[tuple[int, int], set[int]]:
    """Ranks that run the forward of each (direction, stage)."""
    found: dict[tuple[int, int], set[int]] = {}
    for rank, ops in enumerate(ranks):
        for op in ops:
            for leaf in op.leaves:
                if leaf.kind is Kind.F:
                    found.setdefault((leaf.direction, leaf.stage), set()).add(rank)
    return found


def _placement(ranks: list[tuple[Op, ...]]) -> tuple[tuple[int, ...], ...]:
    held = _forwards(ranks)
    if not held:
        raise ValueError('no forward; give a placement line, the rank of each stage')
    directions = 1 + max(direction for direction, _ in held)
    stages = 1 + max(stage for _, stage in held)
    for direction in range(directions):
        for stage in range(stages):
            holders = held.get((direction, stage), set())
            if len(holders) != 1:
                who = f'ranks {sorted(holders)} run' if holders else 'no rank runs'
                raise ValueError(f'{who} the forward of stage {stage}; one rank holds a stage')
    return tuple(
        tuple(min(held[direction, stage]) for stage in range(stages))
        for direction in range(directions)
    )


def _check_stages(ranks: list[tuple[Op, ...]], placement: tuple[tuple[int, ...], ...]) -> None:
    for rank, ops in enumerate(ranks):
        for op in ops:
            for leaf in op.leaves:
                if leaf.direction >= len(placement) or leaf.stage >= len(placement[0]):
                    raise ValueError(f'rank {rank}: {leaf}: the placement has no such stage')


def _microbatches(ranks: list[tuple[Op, ...]]) -> int:
    return len(
        {
            (leaf.direction, leaf.microbatch)
            for ops in ranks
            for op in ops
            for leaf in op.leaves
            if leaf.kind is Kind.F
        }
    )
