"""Scaling curves as text: the best layout by count, the knee, and efficiency by schedule."""

from __future__ import annotations

from megatron_mhc.inputs.table import table
from megatron_mhc.study.budget import Budget
from megatron_mhc.study.points import Point
from megatron_mhc.study.scaling import BEST, ENOUGH, Curve

_NONE = '-'


def as_text(curves: list[Curve], counts: tuple[int, ...], budget: Budget | None) -> str:
    """All of one kind of scaling and one n.

    Args:
        curves: the best first.
        counts: GPUs that were asked for; where nothing fits there is a dash.
        budget: of the training, for its days and costs.
    """
    best = curves[0]
    first = best.points[0].layout.gpus
    grows = 'the same batch' if best.mode == 'strong' else 'a batch that grows with the GPUs'
    return '\n'.join(
        [
            f'{best.mode} scaling, {grows}; efficiency: tokens a second and GPU, by those of the '
            'fewest GPUs',
            *_best(best, sorted(counts), budget),
            *_missing(best, sorted(counts)),
            knee_line(best, first),
            'efficiency of the best layout of each schedule:',
            *_schedules(curves[1:], sorted(counts)),
        ]
    )


def knee_line(curve: Curve, first: int) -> str:
    """Where the curve bends, by which rule, and whether the network is why."""
    rule = f'efficiency below {ENOUGH:.0%} of that of {first} GPUs'
    knee = curve.knee
    if knee is None:
        return f'no knee: no count has an {rule}'
    why = 'so the network takes over' if knee.network else 'not the network'
    return (
        f'knee: {knee.point.layout.gpus} GPUs ({knee.efficiency:.1%}), the first with an {rule}; '
        f'{knee.cause} makes {knee.share:.0%} of the GPU time that a token takes more: {why}'
    )


def _best(curve: Curve, counts: list[int], budget: Budget | None) -> list[str]:
    head = [*'gpus batch tp cp pp ep b m schedule'.split(), 'step, s', 'tokens/s/GPU']
    head += ['efficiency', 'comm.', 'bubble']
    if budget:
        head += ['days', 'GPU-hours', *([] if budget.price is None else ['cost'])]
    found = {point.layout.gpus: point for point in curve.points}
    cells = [head]
    for gpus in counts:
        point = found.get(gpus)
        row = [_NONE] * (len(head) - 1) if point is None else _row(curve, point, budget)
        cells.append([str(gpus), *row])
    return table(cells, '>')


def _missing(curve: Curve, counts: list[int]) -> list[str]:
    found = {point.layout.gpus for point in curve.points}
    missing = [gpus for gpus in counts if gpus not in found]
    if not missing:
        return []
    return [f'{_NONE}: no layout exists, or none fits; --gpus {missing[0]} alone says why']


def _row(curve: Curve, point: Point, budget: Budget | None) -> list[str]:
    layout = point.layout
    sizes = (point.global_batch, layout.tp, layout.cp, layout.pp, layout.ep, layout.micro_batch)
    row = [str(size) for size in (*sizes, point.microbatches)]
    row += [point.schedule_name, f'{point.step_s:.4g}', f'{point.tokens_per_gpu_s:.0f}']
    row += [f'{curve.efficiency(point):.1%}', f'{point.exposed / point.step_s:z.1%}']
    row.append(f'{point.bubble_share:z.1%}')
    if budget:
        found = budget.of(point)
        row += [f'{found["days"]:,.3g}', f'{found["gpu_hours"]:,.0f}']
        row += [f'{found["cost"]:,.0f}'] if budget.price is not None else []
    return row


def _schedules(curves: list[Curve], counts: list[int]) -> list[str]:
    cells = [['gpus', *(curve.schedule for curve in curves)]]
    for gpus in counts:
        row = [str(gpus)]
        for curve in curves:
            found = [point for point in curve.points if point.layout.gpus == gpus]
            row.append(f'{curve.efficiency(found[0]):.1%}' if found else _NONE)
        cells.append(row)
    knees = [curve.knee for curve in curves]
    cells.append(['knee', *(str(knee.point.layout.gpus) if knee else _NONE for knee in knees)])
    return table(cells, '>')


def by_streams(curves: list[Curve]) -> dict[int, list[Curve]]:
    """Curves of one kind of scaling by n; the first of each is the best."""
    found: dict[int, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.streams, []).append(curve)
    assert all(mine[0].schedule == BEST for mine in found.values())
    return found
