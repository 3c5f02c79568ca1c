"""A panel drawn with matplotlib: curves, bands, lines of the alarm, and axes that tell."""

from __future__ import annotations

import math
from typing import Any

from megatron_mhc.monitor.curves import Curve, Groups, limits
from megatron_mhc.monitor.panels import Panel

STYLES = ('-', '--')
# As many points are told apart when each is a dot; one alone would not be seen without.
FEW_POINTS = 40
# A log axis grows by as much for a line of the alarm, a linear one to twice its length.
REACH = 10
# A log axis shows at least such a factor.
LEAST_FACTOR = 2


def plain(text: str) -> str:
    """``text`` for matplotlib: no formula, and nothing that a legend would leave out."""
    text = text.replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def colours(groups: Groups) -> dict[str, str]:
    """Name -> colour, the same in every picture."""
    from matplotlib.colors import to_hex

    return {name: to_hex(f'C{index % 10}') for index, name in enumerate(groups)}


def draw_panel(axes: Any, panel: Panel, found: list[Curve], groups: Groups) -> None:
    """Draw one panel, of which the curves ``found`` are there."""
    base = plain(next(iter(groups)))
    axes.set_title(panel.title.format(base=base), fontsize=9)
    axes.set(xlabel='sublayer l' if panel.by_sublayer else 'iteration', ylabel=panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    # Of curves without a positive value a logarithmic axis would complain.
    axes.set_autoscaley_on(False)
    if panel.log:
        axes.set_yscale('log')
    shown = colours(groups)
    for curve in found:
        _draw_curve(axes, curve, shown[curve.name], panel.log)
    values = [value for curve in found for value in (*curve.low, *curve.high)]
    values = [v for v in values if math.isfinite(v) and not (panel.log and v <= 0)]
    lines = limits(panel, groups)
    low, high = extent([*values, *panel.covers], panel.log)
    # A line far away would press the curves flat; the legend has it all the same.
    furthest = high * REACH if panel.log else 2 * high - low
    near = [value for value in lines if value <= furthest]
    low, high = extent([*values, *panel.covers, *near], panel.log)
    axes.set_ylim(low, high)
    if panel.log:
        _label_log_axis(axes.yaxis, low, high)
    for index, (value, name) in enumerate(lines.items()):
        style = ('--', ':', '-.')[index % 3]
        axes.axhline(value, color='black', lw=1, ls=style, label=plain(name))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, framealpha=0.6)


def _label_log_axis(axis: Any, low: float, high: float) -> None:
    """Plain numbers: within a decade a few of them, else powers of ten."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(NullFormatter())


def _draw_curve(axes: Any, curve: Curve, colour: str, log: bool) -> None:
    marker = '.' if len(curve.steps) <= FEW_POINTS else None
    name = plain(curve.name)
    label = f'{name}, {curve.seeds} seeds' if curve.seeds > 1 else name
    axes.plot(
        curve.steps,
        curve.mean,
        STYLES[curve.tag],
        color=colour,
        lw=1,
        marker=marker,
        ms=4,
        label=label if curve.tag == 0 else None,
    )
    if curve.seeds > 1:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
    # What has no place on the axis stands at its edge.
    edge = {'color': colour, 'ls': '', 'transform': axes.get_xaxis_transform(), 'clip_on': False}
    pairs = list(zip(curve.steps, curve.mean, strict=True))
    if broken := [step for step, value in pairs if math.isnan(value)]:
        axes.plot(broken, [1] * len(broken), marker='x', **edge)
    if log and (zeros := [step for step, value in pairs if value <= 0]):
        axes.plot(zeros, [0] * len(zeros), marker='v', **edge)


def extent(values: list[float], log: bool) -> tuple[float, float]:
    """Limits of an axis around ``values``, with room, and never of rounding noise alone."""
    if not values:
        return (0.1, 10) if log else (0, 1)
    low, high = min(values), max(values)
    if not log:
        room = max(0.05 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-9)
        return low - room, high + room
    if high < LEAST_FACTOR * low:
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = middle / math.sqrt(LEAST_FACTOR), middle * math.sqrt(LEAST_FACTOR)
    room = (high / low) ** 0.05
    return low / room, high * room
