"""The checks of a report: whether values are finite, gains bounded, logits free, streams alive."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_mhc.monitor.finding import HEALTHY, SICK, WATCH, Finding, place, spell
from megatron_mhc.monitor.names import (
    CHECKED,
    COMPOSITE_GAINS,
    COSINE,
    GRADIENT_NORM,
    LOSS,
    RANK,
    SATURATED,
    SINGLE_GAINS,
    WRITE_SHARE,
    sublayer_name,
)
from megatron_mhc.monitor.runs import Run, is_gated, is_hc, own
from megatron_mhc.settings.flags_monitor import PAPER_GAIN, MonitorConfig

# A bf16 number has 8 bits: what is added and has less than 2^-9 of its size is rounded off. The
# same share of the whole, where the skip path is what is lost, above 1 - 2^-9.
LOST = 2**-9


def _percent(share: float) -> str:
    return f'{100 * share:.3g}%'


def finite(run: Run) -> Iterable[Finding]:
    """Streams, maps and outputs of sublayers, loss and gradient norm."""
    rows = [run.by_sublayer.get(f'nonfinite-{name}', {}) for name in CHECKED]
    counts = {step: sum(row[step] for row in rows) for step in rows[0]}
    found = spell(counts, lambda count: count > 0)
    if found is not None:
        sublayer = found.sublayers[0]
        what = next(n for n, row in zip(CHECKED, rows, strict=True) if row[found.last][sublayer])
        yield Finding(
            'finite',
            found.level,
            f'not finite: {what} of {found.where(run.pattern)}, {found.when}',
            float(counts[found.last][sublayer]),
            None,
            *place(found, sublayer),
        )
    for tag, name in ((LOSS, 'loss'), (GRADIENT_NORM, 'gradient norm')):
        points = {step: [value] for step, value in run.scalars.get(tag, {}).items()}
        broken = spell(points, lambda values: [not math.isfinite(values[0])])
        if broken is not None:
            text = f'not finite: the {name}, {broken.when}'
            value = points[broken.last][0]
            found = broken
            yield Finding('finite', broken.level, text, value, None, *place(broken, None))
    if found is None:
        yield Finding('finite', HEALTHY, 'all finite')


def gains(run: Run, settings: MonitorConfig) -> Iterable[Finding]:
    """Amax gains of single and composite H_res: bounded, or exploding."""
    import numpy

    def larger(names: tuple[str, str]) -> dict[int, Any]:
        forward, backward = (run.by_sublayer[name] for name in names)
        return {step: numpy.fmax(forward[step], backward[step]) for step in forward}

    limit = settings.alarm_gain
    single, composite = larger(SINGLE_GAINS), larger(COMPOSITE_GAINS)
    # The product grows from the last sublayer backwards, so that trouble begins at the last one.
    spells = [
        (found, history, subject, end)
        for history, subject, end in (
            (single, 'H_res of {} has', 0),
            (composite, 'the product of all H_res from {} on has', -1),
        )
        if (found := spell(history, lambda gains: gains > limit)) is not None
    ]
    if spells:
        # What goes on comes before what is over, single maps before products.
        found, history, subject, end = min(spells, key=lambda one: one[0].over)
        sublayer = found.sublayers[end]
        value = float(numpy.nanmax(history[found.last]))
        yield Finding(
            'gains',
            found.level,
            f'exploding gains: {subject.format(found.where(run.pattern, sublayer))} an amax gain '
            f'above {limit:g}, up to {value:.3g}, {found.when}',
            value,
            limit,
            *place(found, sublayer),
        )
        return
    if numpy.isnan([*composite.values()]).all():
        return
    most = float(numpy.nanmax([*composite.values()]))
    above = None if is_hc(run) else spell(composite, lambda gains: gains > PAPER_GAIN)
    if above is None:
        text = f'gains bounded (composite at most {most:.3g}; the alarm is at {limit:g})'
        yield Finding('gains', HEALTHY, text, most, limit)
        return
    value = float(numpy.nanmax(composite[above.last]))
    yield Finding(
        'gains',
        WATCH,
        f'composite gain {value:.3g}, above the {PAPER_GAIN} of the mHC paper, {above.when}, from '
        f'{sublayer_name(above.sublayers[-1], run.pattern)} on; the alarm is at {limit:g}',
        value,
        PAPER_GAIN,
        *place(above, above.sublayers[-1]),
    )


def saturation(run: Run, settings: MonitorConfig) -> Iterable[Finding]:
    """Rows of H_res whose logits no gradient reaches."""
    import numpy

    shares = run.by_sublayer[SATURATED]
    if numpy.isnan(shares[max(shares)]).all():
        # This H_res has no logits.
        return
    limit = settings.alarm_saturation
    many = spell(shares, lambda share: share > limit)
    some = spell(shares, lambda share: share > 0)
    found = many if some is None or some.over or (many and not many.over) else some
    if found is None:
        yield Finding('saturation', HEALTHY, 'no saturated rows', 0.0, limit)
        return
    sublayer = found.sublayers[0]
    value, there = float(shares[found.last][sublayer]), found.where(run.pattern)
    yield Finding(
        'saturation',
        found.level if found is many else WATCH,
        f'saturated logits: {_percent(value)} of the rows of H_res of {there} get no '
        f'gradient, {found.when} (the alarm is at {_percent(limit)})',
        value,
        limit,
        *place(found, sublayer),
    )


def streams(run: Run, settings: MonitorConfig) -> Iterable[Finding]:
    """Streams that became one, as the alarm has it, or that all are one so far."""
    import numpy

    (_, number, _) = run.composite.shape
    # Before the first sublayer the streams are equal in every run.
    ranks = {step: row[1:] for step, row in run.by_sublayer[RANK].items()}
    least, last = settings.alarm_rank, ranks[max(ranks)]
    if number == 1 or numpy.isnan(last).all():
        return
    most = numpy.fmax.reduce([*ranks.values()])
    cosine = own(run, COSINE)
    mean = f', mean cosine {cosine[max(cosine)]:.4f}' if cosine else ''
    fallen = spell(ranks, lambda rank: (rank < least) & (most > settings.apart))
    equal = spell(ranks, lambda rank: (rank < least).all(keepdims=True))
    if fallen is not None and not fallen.over:
        sublayer = fallen.sublayers[0] + 1
        value, before = float(last[sublayer - 1]), most[sublayer - 1]
        moved = fallen._replace(sublayers=[sublayer + 1 for sublayer in fallen.sublayers])
        there = moved.where(run.pattern)
        text = (
            f'collapsed streams: those before {there} have effective rank {value:.4f}, '
            f'below {least:g}, after {before:.3g}, {fallen.when}'
        )
        yield Finding('streams', SICK, text, value, least, *place(fallen, sublayer))
    elif equal is not None and not equal.over:
        value = float(numpy.nanmax(last))
        text = (
            f'collapsed streams: equal before every sublayer, effective rank at most {value:.4f}'
            f'{mean}, {equal.when}{"" if is_gated(run) else "; H_res gets no gradient"}'
        )
        yield Finding('streams', SICK, text, value, least, *place(equal, None))
    else:
        value = float(numpy.nanmean(last))
        text = f'streams alive (effective rank {value:.3g} of {number}{mean})'
        yield Finding('streams', HEALTHY, text, value, least)


def writes(run: Run) -> Iterable[Finding]:
    """What sublayers add, beside what the skip path keeps: neither may be rounded off."""
    import numpy

    shares = run.by_sublayer[WRITE_SHARE]
    last = shares[max(shares)]
    if numpy.isnan(last).all():
        return
    low, high = float(numpy.nanmin(last)), float(numpy.nanmax(last))
    for name, is_bad, limit in (
        ('adds next to nothing', lambda share: share < LOST, LOST),
        ('drowns the streams that it reads', lambda share: share > 1 - LOST, 1 - LOST),
    ):
        found = spell(shares, is_bad)
        if found is not None and not found.over:
            sublayer = found.sublayers[0]
            value, there = float(last[sublayer]), found.where(run.pattern)
            text = (
                f'write share near {limit:.0f}: {there} {name}, {_percent(value)} of what '
                f'it leaves, {found.when}'
            )
            yield Finding('writes', SICK, text, value, limit, *place(found, sublayer))
            return
    text = f'sublayers write {_percent(low)} to {_percent(high)} of what they leave'
    yield Finding('writes', HEALTHY, text, low, LOST)
