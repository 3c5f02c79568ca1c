"""The settings of a pipeline schedule that is run from a plan, checked value by value."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from megatron_mhc.inputs.values import MOST_TOKENS, shown
from megatron_mhc.settings.flag import check, setting
from megatron_mhc.settings.names import PIPELINE_SCHEDULES, V_SCHEDULES


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline schedule on the inverted V: rank r of P holds stages P - 1 - r and P + r.

    ``zb-v`` is of arXiv 2405.15362; the fused slots of ``dualpipev-w`` leave the weight gradients
    until after the slot, so that both hops start earlier.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    schedule: str = setting(
        MISSING,
        '--pipeline-schedule',
        choices=PIPELINE_SCHEDULES,
        said="Megatron's flags",
        help='`1f1b` and `interleaved` are stock Megatron; `zb-v`, `dualpipev` and `dualpipev-w` '
        'run from a plan',
    )
    verify_steps: int = setting(
        0,
        '--pipeline-verify-steps',
        int,
        most=MOST_TOKENS,
        why='it counts steps',
        only={'schedule': V_SCHEDULES},
        metavar='N',
        help='run the first N steps twice, the second time fully synchronised, and stop unless '
        'losses and gradients agree bit for bit; logged as one step',
    )

    def __post_init__(self) -> None:
        if self.schedule not in V_SCHEDULES:
            raise ValueError(
                f'--pipeline-schedule {shown(self.schedule)}: not run from a plan; choose one of '
                f'{", ".join(V_SCHEDULES)}'
            )
        check(self)


@dataclass(frozen=True)
class PipelineOptions:
    """What the command line says of pipelines beside a ``PipelineConfig``."""

    w_placement: str | None = setting(
        None,
        '--pipeline-w-placement',
        choices=('slot', 'after'),
        only={'schedule': ('dualpipev-w', 'dualpipev')},
        said='by schedule',
        help='where a fused slot computes its weight gradients: in the `slot`, while communication '
        'waits, or `after` it, so that both stage hops start earlier',
        more='slot is dualpipev, after is dualpipev-w: they differ in nothing else',
    )
    post_stream: str = setting(
        'compute',
        '--mhc-post-stream',
        choices=('compute', 'high'),
        help='stream for F_post,res of the MLP sublayers, forward and backward: `compute`, or '
        '`high`, one of high priority; with every residual type',
        more='on a stream of high priority neither it nor stage communication waits for other '
        'compute (mHC, section 4.3.3)',
    )
