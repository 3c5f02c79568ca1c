"""The answer of a study, as words and as plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_mhc.settings.queues import CONNECTIONS, connections
from megatron_mhc.study.budget import Budget
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.output import points_table, queues, refusals, verdict
from megatron_mhc.study.points import Study, best_of, pareto
from megatron_mhc.study.scaling import Curve, rows, several
from megatron_mhc.study.scaling_text import as_text, by_streams


@dataclass(frozen=True)
class Answer:
    """All that a study has found.

    Args:
        title: model, batch, machine and kernels.
        hardware: the machine.
        study: every layout.
        counts: GPUs that were asked for.
        curves: of each kind of scaling.
        flags: of the best layout, by n.
        budget: of the training; None where nobody knows its tokens.
    """

    title: str
    hardware: Hardware
    study: Study
    counts: tuple[int, ...]
    curves: list[list[Curve]]
    flags: dict[int, str]
    budget: Budget | None


def plain(answer: Answer) -> dict[str, Any]:
    """Values for JSON."""
    study = answer.study
    fronts = {n: pareto(points) for n, points in study.streams.items()}
    return {
        'hardware': dataclasses.asdict(answer.hardware),
        'points': [point.as_dict() for point in study.points],
        'pareto': [point.as_dict() for front in fronts.values() for point in front],
        'scaling': rows((one for found in answer.curves for one in found), answer.budget),
        'refused': [
            {'reason': reason.words, 'remedy': reason.remedy, 'layouts': count}
            for reason, count in study.refused.items()
        ],
        'best': [
            front[0].as_dict()
            | {
                'flags': answer.flags[n],
                'environment': {CONNECTIONS: connections(front[0].one_queue)},
            }
            | (answer.budget.of(front[0]) if answer.budget else {})
            for n, front in fronts.items()
            if front
        ],
    }


def as_words(answer: Answer, top: int) -> str:
    """Lines for a terminal.

    Args:
        top: layouts of a table.
    """
    study = answer.study
    lines = [
        answer.title,
        f'{len(study.points)} layouts, {sum(point.fits for point in study.points)} fit',
    ]
    if study.refused:
        lines.append(refusals(study))
    for n, points in study.streams.items():
        front, best = pareto(points), best_of(points)
        lines.append(f'\n{n} stream{"s" * (n > 1)}')
        if front:
            shown = f'{min(top, len(front))} of {len(front)}'
            lines.append(f'no other is better in step, memory and GPUs at once ({shown}):')
            lines.append(points_table(front[:top]))
        lines.append(verdict(points, answer.hardware))
        if best is not None:
            lines += [answer.budget.words(best)] if answer.budget else []
            lines += ['    ' + answer.flags[n], queues(best, answer.hardware)]
        for found in answer.curves:
            mine = by_streams(found).get(n, [])
            if several(mine):
                lines += ['', as_text(mine, answer.counts, answer.budget)]
    return '\n'.join(lines)
