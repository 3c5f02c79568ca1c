"""The settings of a pipeline schedule that is run from a plan, checked value by value."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from megatron_mhc.inputs.values import MOST_TOKENS, shown
from megatron_mhc.settings.flag import check, refuse_stray, setting
from megatron_mhc.settings.names import (
    MIRRORED_SCHEDULES,
    PIPELINE_SCHEDULES,
    PLANNED_SCHEDULES,
    V_SCHEDULES,
)


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline schedule that is run from a plan.

    ``1f1b-overlap`` and ``zb-h1`` have one stage a rank. ``dualpipe`` has two copies of the model,
    and rank r stages r and P - 1 - r. All others are on the inverted V: rank r of P holds stages
    P - 1 - r and P + r. ``zb-v``, ``v-half`` and ``v-min`` are of arXiv 2405.15362; the fused slots
    of ``dualpipev-w`` leave the weight gradients until after the slot, so that both hops start
    earlier.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    schedule: str = setting(
        MISSING,
        '--pipeline-schedule',
        choices=PIPELINE_SCHEDULES,
        said="Megatron's flags",
        metavar='NAME',
        help='`1f1b` and `interleaved` are stock Megatron; '
        f'{", ".join(f"`{name}`" for name in PLANNED_SCHEDULES)} run from a plan',
    )
    verify_steps: int = setting(
        0,
        '--pipeline-verify-steps',
        int,
        most=MOST_TOKENS,
        why='it counts steps',
        only={'schedule': PLANNED_SCHEDULES},
        metavar='N',
        help='run the first N steps twice, the second time fully synchronised, and stop unless '
        'losses and gradients agree bit for bit; logged as one step',
    )
    live_bound: float | None = setting(
        None,
        '--pipeline-live-bound',
        float,
        most=MOST_TOKENS,
        above=True,
        why='it counts microbatches, each for all layers of a rank',
        only={'schedule': ('v-bound',)},
        said='P // 2 + 1, as v-half',
        metavar='X',
        help='most microbatches whose activations a rank may hold at once: the plan with the least '
        'bubble is searched and proved; from about P / 3 to P',
    )

    def __post_init__(self) -> None:
        if self.schedule not in PLANNED_SCHEDULES:
            raise ValueError(
                f'--pipeline-schedule {shown(self.schedule)}: not run from a plan; choose one of '
                f'{", ".join(PLANNED_SCHEDULES)}'
            )
        check(self)
        refuse_stray(self)

    @property
    def on_v(self) -> bool:
        """Whether a rank holds two stages, of an inverted V."""
        return self.schedule in V_SCHEDULES

    @property
    def mirrored(self) -> bool:
        """Whether a rank holds two stages, each of another copy of the model."""
        return self.schedule in MIRRORED_SCHEDULES

    @property
    def two_chunks(self) -> bool:
        """Whether a rank holds two stages of any kind; else it holds one, as in 1F1B."""
        return self.on_v or self.mirrored


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
