"""What a report says is wrong: which sublayer was the first, and what to do about it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mhc.monitor.names import (
    CHECKED,
    COMPOSITE_GAINS,
    RANK,
    SATURATED,
    SINGLE_GAINS,
    sublayer_name,
)
from megatron_mhc.monitor.reduce import Report
from megatron_mhc.settings.flags_monitor import MonitorConfig

_CAUSES = {
    'streams': 'the streams that it reads are not finite, although every map and output before it '
    'is; the embedding, if this is the first sublayer, else an overflow: look at the gains, lower '
    'the learning rate, or use --residual-type mhc',
    'maps': 'its H_post or H_res is not finite, although the streams that it reads are; its '
    'mapping parameters are broken, or the streams beyond 5e18, where fp32 cannot hold their '
    'squares: go back to an earlier checkpoint, lower the learning rate',
    'outputs': 'its output is not finite, although its streams and maps are; its weights or its '
    'arithmetic are broken: go back to an earlier checkpoint, lower the learning rate, or skip the '
    'data',
}


def largest_ranks(report: Report, before: Tensor | None) -> Tensor | None:
    """The largest effective rank of each sublayer's streams so far, ``[L]``.

    Args:
        report: the newest.
        before: what this returned for the one before it.
    """
    now = report.metrics.get(RANK)
    if now is None or before is None:
        return before if now is None else now
    return torch.fmax(now, before)


def trouble(
    report: Report,
    settings: MonitorConfig,
    gradient_norm: float | None = None,
    ranks: Tensor | None = None,
) -> str | None:
    """One line about the first sublayer in trouble; None if there is none.

    What is not finite comes before gains, those before saturation and collapse, and forward before
    backward: everything after the first sublayer follows from it.

    Args:
        report: the reduced measurements.
        settings: the thresholds.
        gradient_norm: of the whole model; None where the optimizer skipped the step, for which the
            loss scaler has its own answer.
        ranks: ``largest_ranks`` of the reports so far. Streams that never came apart have not
            collapsed: most starts begin with equal ones.
    """
    for sublayer in range(len(report.present)):
        for kind in CHECKED:
            if report.metrics[f'nonfinite-{kind}'][sublayer] > 0:
                return f'{_where(report, sublayer)}: {_CAUSES[kind]}'
    if gradient_norm is not None and not math.isfinite(gradient_norm):
        bad = ~torch.isfinite(report.metrics['mapping-grad-norm'])
        if bad.any():
            # The backward meets the last one first.
            return (
                f'{_where(report, int(bad.nonzero().max()))}: the gradient of its mapping '
                'parameters is not finite, and the forward was; the backward came from there or '
                'from behind it: the loss or the output layer, if it is the last sublayer'
            )
        return (
            f'the gradient norm is {gradient_norm}, but streams, maps, outputs and mapping '
            'gradients of every sublayer are finite: look at the embedding and the output layer'
        )
    if report.h_res is None:
        return None
    single, composite = _larger(report, SINGLE_GAINS), _larger(report, COMPOSITE_GAINS)
    above = (single > settings.alarm_gain).nonzero().flatten()
    if above.numel():
        return _gain_line(report, int(above[0]), 'H_res has', single, settings)
    above = (composite > settings.alarm_gain).nonzero().flatten()
    if above.numel():
        # The product grows from the last sublayer backwards.
        where = int(above[-1])
        return _gain_line(report, where, 'the product of H_res from it on has', composite, settings)
    return _saturation(report, settings) or _collapse(report, settings, ranks)


def _saturation(report: Report, settings: MonitorConfig) -> str | None:
    share = report.metrics.get(SATURATED)
    if share is None or not (above := share > settings.alarm_saturation).any():
        return None
    where = int(above.nonzero()[0])
    return (
        f'{_where(report, where)}: {share[where]:.0%} of the rows of H_res are saturated, above '
        f'{settings.alarm_saturation:.0%} (--mhc-alarm-saturation); their logits get no gradient '
        'and do not come back: go back to an earlier checkpoint, and lower --mhc-mapping-lr-mult'
    )


def _collapse(report: Report, settings: MonitorConfig, ranks: Tensor | None) -> str | None:
    least = settings.alarm_rank
    if ranks is None:
        return None
    fallen = (report.metrics[RANK] < least) & (ranks > settings.apart)
    if not fallen.any():
        return None
    where = int(fallen.nonzero()[0])
    return (
        f'{_where(report, where)}: the streams that it reads have become one, of effective rank '
        f'{report.metrics[RANK][where]:.5f} after {ranks[where]:.3f}, below {least:g} '
        '(--mhc-alarm-rank); H_res gets no gradient from equal streams: look at H_res and H_post '
        'of the sublayer before, go back to an earlier checkpoint, or lower --mhc-mapping-lr-mult'
    )


def _gain_line(
    report: Report, sublayer: int, subject: str, gain: Tensor, settings: MonitorConfig
) -> str:
    return (
        f'{_where(report, sublayer)}: {subject} amax gain {gain[sublayer]:.4g}, above '
        f'{settings.alarm_gain:g} (--mhc-alarm-gain); the streams or their gradients explode: use '
        '--residual-type mhc, lower the learning rate, or allow more'
    )


def _where(report: Report, sublayer: int) -> str:
    name = sublayer_name(sublayer, report.pattern)
    return f'{name} (pipeline rank {report.pipeline_rank[sublayer]})'


def _larger(report: Report, names: tuple[str, str]) -> Tensor:
    forward, backward = (report.metrics[name].nan_to_num(0) for name in names)
    return torch.where(report.present, torch.maximum(forward, backward), 0)
