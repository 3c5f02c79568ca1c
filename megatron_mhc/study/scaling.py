"""How a step scales with the GPUs: the best layouts by count as curves, and where they bend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_mhc.study.budget import Budget
from megatron_mhc.study.points import Point, breakdown

# The curve of the fastest layouts, whatever their schedule.
BEST = 'best'
# A curve bends at the first count whose efficiency is below this.
ENOUGH = 0.9


class Knee(NamedTuple):
    """Where a curve bends.

    Args:
        point: the first whose efficiency is below ``ENOUGH``.
        efficiency: there.
        cause: the part of a step that has grown most, of ``losses``.
        share: of all that has grown.
    """

    point: Point
    efficiency: float
    cause: str
    share: float

    @property
    def network(self) -> bool:
        """Whether communication is the cause."""
        return self.cause == COMMUNICATION


COMMUNICATION = 'communication'


@dataclass(frozen=True)
class Curve:
    """The fastest layout that fits, by number of GPUs.

    Args:
        mode: ``strong`` or ``weak``, of ``SCALING``.
        streams: n.
        schedule: of the pipeline, for people; ``BEST`` for the fastest of all.
        points: ascending; at least one.
    """

    mode: str
    streams: int
    schedule: str
    points: tuple[Point, ...]

    def efficiency(self, point: Point) -> float:
        """Tokens a second and GPU, by those of the fewest GPUs: strong and weak alike."""
        return point.tokens_per_gpu_s / self.points[0].tokens_per_gpu_s

    @property
    def knee(self) -> Knee | None:
        """Where it bends; None where it does not."""
        first = losses(self.points[0])
        for point in self.points:
            efficiency = self.efficiency(point)
            if efficiency < ENOUGH:
                grown = {name: lost - first[name] for name, lost in losses(point).items()}
                cause = max(grown, key=lambda name: grown[name])
                total = sum(max(0.0, value) for value in grown.values())
                return Knee(point, efficiency, cause, grown[cause] / total)
        return None


def losses(point: Point) -> dict[str, float]:
    """GPU-seconds a token by what they are spent on; comparable between any two layouts."""
    parts = breakdown(point)
    communication = point.exposed
    kept = {name: parts[name] for name in ('compute', 'bubble', 'optimizer')}
    tokens = point.tokens_per_gpu_s * point.step_s
    return {name: part / tokens for name, part in (kept | {COMMUNICATION: communication}).items()}


def curves(points: Iterable[Point], mode: str) -> list[Curve]:
    """By n, the fastest of all first, then each schedule; those where nothing fits have none."""
    best: dict[tuple[int, str], dict[int, Point]] = {}
    for point in points:
        if not point.fits:
            continue
        for schedule in (BEST, point.schedule_name):
            found = best.setdefault((point.streams, schedule), {})
            gpus = point.layout.gpus
            other = found.setdefault(gpus, point)
            if (point.step_s, point.memory_gib) < (other.step_s, other.memory_gib):
                found[gpus] = point
    order = sorted(best, key=lambda key: (key[0], key[1] != BEST))
    return [
        Curve(mode, n, schedule, tuple(found for _, found in sorted(best[n, schedule].items())))
        for n, schedule in order
    ]


def rows(found: Iterable[Curve], budget: Budget | None) -> list[dict[str, Any]]:
    """A row for each point of each curve, as plain values."""
    table = []
    for curve in found:
        knee = curve.knee
        for point in curve.points:
            bends = knee is not None and point is knee.point
            row = {'scaling': curve.mode, 'curve': curve.schedule, **point.as_dict()}
            row |= {'efficiency': curve.efficiency(point)}
            row |= {'knee': knee.cause if knee is not None and bends else ''}
            table.append(row | (budget.of(point) if budget else {}))
    return table


def several(found: Iterable[Curve]) -> bool:
    """Whether there is a curve at all: two numbers of GPUs."""
    return any(len(curve.points) > 1 for curve in found)
