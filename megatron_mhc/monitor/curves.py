"""From runs to the curves of a panel: several seeds of one name become one, with a band."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from megatron_mhc.monitor.names import LOSS
from megatron_mhc.monitor.panels import GAP, PANELS, Panel
from megatron_mhc.monitor.runs import Run, is_hc, present
from megatron_mhc.monitor.verdict import alarm_settings
from megatron_mhc.settings.flags_monitor import PAPER_GAIN

Points = dict[int, float]
Groups = dict[str, list[Run]]
# More would make a legend too wide.
FEW_NAMES = 2


class Curve(NamedTuple):
    """One tag of one name: the mean over its seeds, and the smallest and largest of them.

    Where they all have a point. ``low`` and ``high`` are ``mean`` where there is one seed.
    """

    name: str
    tag: int
    seeds: int
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def drawn_panels(groups: Groups) -> list[tuple[Panel, list[Curve]]]:
    """Each panel of which there is something to draw, with that."""
    return [(panel, found) for panel in PANELS if (found := curves(panel, groups))]


def curves(panel: Panel, groups: Groups) -> list[Curve]:
    """What there is to draw, in the order of names and tags; empty where no run has any of it."""
    base = next(iter(groups.values()))
    if panel.tags == (GAP,) and len(groups) == 1:
        return []
    found = []
    for name, runs in groups.items():
        for number, tag in enumerate(panel.tags):
            seeds = [points for run in runs if (points := _points(panel, tag, run, base))]
            if seeds:
                found.append(over_seeds(name, number, seeds))
    return found


def over_seeds(name: str, tag: int, seeds: list[Points]) -> Curve:
    """Mean, smallest and largest at the steps that all ``seeds`` have."""
    steps = sorted(set.intersection(*map(set, seeds)))
    columns = [[points[step] for points in seeds] for step in steps]

    def of(measure: Callable[[Iterable[float]], float]) -> list[float]:
        return [measure(c) if all(map(math.isfinite, c)) else math.nan for c in columns]

    mean = of(lambda values: math.fsum(values) / len(seeds))
    return Curve(name, tag, len(seeds), steps, mean, of(min), of(max))


def _points(panel: Panel, tag: str, run: Run, base: list[Run]) -> Points:
    if tag == GAP:
        same = [other for other in base if other.seed == run.seed] or base
        curve = over_seeds('', 0, [other.scalars[LOSS] for other in same])
        baseline = dict(zip(curve.steps, curve.mean, strict=True))
        return loss_gap(run.scalars[LOSS], baseline)
    if panel.by_sublayer:
        history = run.by_sublayer.get(tag)
        values = history[max(history)].tolist() if history else []
        if all(map(math.isnan, values)):
            return {}
        return {sublayer: values[sublayer] for sublayer in present(run)}
    return run.scalars.get(tag, {})


def loss_gap(losses: Points, baseline: Points) -> Points:
    """Iteration -> loss less that of ``baseline``, a mean over a tenth of the points."""
    gaps = {step: losses[step] - baseline[step] for step in losses if step in baseline}
    window, values = max(1, len(gaps) // 10), list(gaps.values())
    return {
        step: sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
        for i, step in enumerate(gaps)
    }


def limits(panel: Panel, groups: Groups) -> dict[float, str]:
    """Value -> what the line there is called."""
    lines: dict[float, str] = {}
    runs = [run for seeds in groups.values() for run in seeds if run.iteration is not None]
    for limit in panel.limits:
        if limit == PAPER_GAIN:
            if not all(is_hc(run) for run in runs):
                lines[PAPER_GAIN] = f'{PAPER_GAIN}, most in the mHC paper'
        elif isinstance(limit, float):
            lines[limit] = f'{limit:.3f}'
        else:
            for run in runs:
                value = getattr(alarm_settings(run), limit)
                names = {r.name: 0 for r in runs if getattr(alarm_settings(r), limit) == value}
                lines[value] = f'alarm at {value:g}'
                if len(names) < len({r.name for r in runs}):
                    said = ', '.join(names) if len(names) <= FEW_NAMES else f'{len(names)} names'
                    lines[value] += f' ({said})'
    return lines
