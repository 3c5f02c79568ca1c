"""The panels of a report: what is drawn, and how a healthy run looks there."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mhc.monitor.checks import LOST
from megatron_mhc.monitor.names import (
    COMPOSITE_GAINS,
    COSINE,
    GRADIENT_NORM,
    LOGIT,
    LOGIT_GRADIENT,
    LOSS,
    PREFIX,
    RANK,
    SATURATED,
    SINGLE_GAINS,
    WRITE_SHARE,
)
from megatron_mhc.settings.flags_monitor import PAPER_GAIN

# Instead of a tag: the loss less that of the first name.
GAP = 'gap'


class Panel(NamedTuple):
    """One pair of axes.

    Args:
        section: heading under which it stands.
        title: what is drawn.
        unit: of the y axis.
        tags: of scalars, or rows by sublayer; a solid curve, then a dashed one.
        healthy: one line.
        by_sublayer: over the sublayers, of the last report, instead of over iterations.
        log: whether the y axis is logarithmic.
        covers: what the y axis shows at least, so that rounding noise stays flat.
        limits: settings of the alarm, or numbers, drawn as lines.
    """

    section: str
    title: str
    unit: str
    tags: tuple[str, ...]
    healthy: str
    by_sublayer: bool = False
    log: bool = False
    covers: tuple[float, ...] = ()
    limits: tuple[str | float, ...] = ()


def _own(*names: str) -> tuple[str, ...]:
    return tuple(PREFIX + name for name in names)


def _gains(
    title: str, tags: tuple[str, ...], healthy: str, by_sublayer: bool, *limits: str | float
) -> Panel:
    tags = tags if by_sublayer else _own(*tags)
    healthy += '; solid: forward, dashed: backward'
    return Panel('Gains', title, 'amax gain', tags, healthy, by_sublayer, True, (0.9, 2), limits)


PANELS = (
    Panel('Loss', 'training loss', 'nats per token', (LOSS,), 'falls, without lasting jumps'),
    Panel(
        'Loss',
        'loss less that of {base}, running mean',
        'nats per token',
        (GAP,),
        'below 0 is better than {base}; one seed does not say how much of it is chance',
        covers=(-0.01, 0.01),
    ),
    Panel(
        'Loss',
        'gradient norm',
        'norm',
        (GRADIENT_NORM, *_own('mapping-grad-norm')),
        'no lasting growth; solid: the model, dashed: the mapping parameters, well below it',
        log=True,
    ),
    _gains(
        'gain of one H_res, largest of all sublayers',
        SINGLE_GAINS,
        'mhc: 1; hc: below 2',
        False,
        'alarm_gain',
    ),
    _gains(
        'gain of the composite H_res[L-1] ... H_res[l], largest of all l',
        COMPOSITE_GAINS,
        f'mhc: 1 to {PAPER_GAIN}; hc: grows with depth',
        False,
        PAPER_GAIN,
        'alarm_gain',
    ),
    _gains(
        'gain of H_res[l], last report',
        SINGLE_GAINS,
        'no sublayer stands out',
        True,
        'alarm_gain',
    ),
    _gains(
        'gain of H_res[L-1] ... H_res[l], last report',
        COMPOSITE_GAINS,
        'mhc: flat; a step is the sublayer that growth comes from',
        True,
        PAPER_GAIN,
        'alarm_gain',
    ),
    Panel(
        'Streams',
        'effective rank of the streams, mean of all sublayers',
        '1 to n',
        _own(RANK),
        'above 1, where the n streams are one',
        covers=(1, 1.2),
        limits=('alarm_rank',),
    ),
    Panel(
        'Streams',
        'cosine of two streams, mean of all sublayers',
        'cosine',
        _own(COSINE),
        'below 1',
        covers=(0.9, 1),
    ),
    Panel(
        'Streams',
        'effective rank before sublayer l, last report',
        '1 to n',
        (RANK,),
        '1 before the first sublayer in every run, then above',
        by_sublayer=True,
        covers=(1, 1.2),
        limits=('alarm_rank',),
    ),
    Panel(
        'Streams',
        'write share, mean of all sublayers',
        'share of the sum of norms',
        _own(WRITE_SHARE),
        'what a sublayer adds beside what is kept: neither 0 nor 1',
        covers=(0, 0.5),
    ),
    Panel(
        'Streams',
        'write share of sublayer l, last report',
        'share of the sum of norms',
        (WRITE_SHARE,),
        f'{LOST:.3f} to {1 - LOST:.3f}; beyond, bf16 rounds off what is added, or what is kept',
        by_sublayer=True,
        covers=(0, 0.5),
        limits=(LOST, 1 - LOST),
    ),
    Panel(
        'Streams',
        'root mean square of a stream, mean of all sublayers',
        'rms',
        _own('stream-rms'),
        'no runaway',
        log=True,
    ),
    Panel(
        'Streams',
        'norm of the smallest stream by the largest, least of all sublayers',
        'ratio',
        _own('stream-norm-ratio'),
        'does not fall to 0, where a stream dies out',
        covers=(0, 1),
    ),
    Panel(
        'Logits of H_res',
        'largest logit, without sign, before Sinkhorn-Knopp',
        'logit',
        _own(LOGIT),
        'no runaway; 6 where identity begins, 0 where uniform does',
        covers=(0, 8),
    ),
    Panel(
        'Logits of H_res',
        'largest gradient of a logit, without sign',
        'nats per logit',
        _own(LOGIT_GRADIENT),
        'above 0',
        log=True,
    ),
    Panel(
        'Logits of H_res',
        'saturated rows, largest share of all sublayers',
        'share of rows',
        _own(SATURATED),
        '0: the logits of such a row get no gradient any more',
        covers=(0, 0.2),
        limits=('alarm_saturation',),
    ),
)
