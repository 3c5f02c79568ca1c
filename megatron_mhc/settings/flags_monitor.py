"""The monitors of a command line: their settings, and from a namespace to them."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.inputs.values import MOST_TOKENS
from megatron_mhc.settings.flag import check, flags_of, given, setting

# By type: mHC's composite gain was at most 1.6 in the paper and cannot exceed n; HC's grows with
# depth from the start and was 3000 where the paper's run had become unstable.
PAPER_GAIN = 1.6
ALARM_GAINS = {'mhc': 3.0, 'hc': 100.0, 'gated': 3.0}
# Gains are fp32: above this an alarm could not be raised.
GREATEST_GAIN = 1e38


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Settings of the monitors.

    Each field but the last says what it is through its flag (``megatron-mhc docs flags``).
    ``stops_at_nan``: end the run when the gradient norm is not finite, whatever ``alarm``
    says.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    writes: bool = setting(
        False,
        '--mhc-monitor',
        bool,
        help='write the scalars of hyper-connections, and the mean H_res of each sublayer, to '
        'TensorBoard and W&B',
        more='single and composite gains of H_res, its distance from doubly stochastic, its logits '
        'and their gradients, entropies of H_pre and H_post, norms, similarity and effective rank '
        'of the streams, gradient norm of the mapping parameters, counts of non-finite values',
    )
    interval: int = setting(
        MISSING,
        '--mhc-monitor-interval',
        int,
        least=1,
        most=MOST_TOKENS,
        metavar='N',
        said='`--log-interval`',
        why='it counts iterations',
        help='iterations between two reports',
    )
    tokens: int = setting(
        1024,
        '--mhc-monitor-tokens',
        int,
        least=1,
        most=MOST_TOKENS,
        metavar='K',
        help='maximum number of tokens measured per report and rank, evenly spaced in the '
        'microbatch',
    )
    per_layer: bool = setting(
        False,
        '--mhc-monitor-per-layer',
        bool,
        help='write each scalar of every sublayer too, as `mhc/NAME/layer-3-mlp`, and the entries '
        'of H_res',
    )
    alarm: str = setting(
        'off',
        '--mhc-alarm',
        choices=('off', 'warn', 'stop'),
        help='`warn`: name the first layer in trouble; `stop`: also end all ranks, with status 3',
        more='trouble is a non-finite stream, map, output or mapping gradient, a gain above '
        '--mhc-alarm-gain, rows of H_res that no gradient reaches, or streams that become one; '
        "takes over Megatron's own NaN check, which would end the run before the layer is known",
    )
    alarm_gain: float = setting(
        ALARM_GAINS['mhc'],
        '--mhc-alarm-gain',
        float,
        least=1,
        most=GREATEST_GAIN,
        above=True,
        metavar='GAIN',
        said=', '.join(f'{gain:g} for {name}' for name, gain in ALARM_GAINS.items()),
        why='1 is the gain of a doubly stochastic H_res',
        help='amax gain, single or composite, above which the alarm is raised',
        more='the mHC paper saw at most 1.6 for mHC and 3000 for HC',
    )
    alarm_saturation: float = setting(
        0.1,
        '--mhc-alarm-saturation',
        float,
        most=1,
        metavar='SHARE',
        why='it is a share; with 1 the alarm is never raised',
        help='share of the rows of H_res that no gradient reaches above which the alarm is raised',
        more='rows with one entry of 1, to fp32; for mhc on a doubly stochastic manifold',
    )
    alarm_rank: float = setting(
        1.001,
        '--mhc-alarm-rank',
        float,
        least=1,
        most=1.1,
        metavar='RANK',
        why='1 is the effective rank of equal streams; with 1 the alarm is never raised',
        help='effective rank of the streams below which the alarm is raised, where it was ten '
        'times as far above 1 before',
        more='four streams with a mean cosine of 0.9999 have 1.0009',
    )
    stops_at_nan: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def apart(self) -> float:
        """The effective rank of streams that have come apart: ten times as far above 1."""
        return 1 + 10 * (self.alarm_rank - 1)


def monitor_config_from_args(args: argparse.Namespace) -> MonitorConfig | None:
    """The settings that ``args`` describes; None where nothing is monitored.

    Raises:
        ValueError: a value is out of range, or a flag has no effect.
    """
    values = given(args, MonitorConfig)
    if not values:
        return None
    flag = flags_of(MonitorConfig)[next(iter(values))].name
    residual_type = getattr(args, 'residual_type', 'standard')
    if residual_type == 'standard':
        raise ValueError(
            f'{flag} has no effect with --residual-type standard, which has no maps to monitor; '
            'drop it or set --residual-type mhc'
        )
    alarm = values.get('alarm', 'off') != 'off'
    if not values.get('writes') and not alarm:
        raise ValueError(
            f'{flag} has no effect without --mhc-monitor or --mhc-alarm warn; add one of them'
        )
    thresholds = [name for name in values if name.startswith('alarm_')]
    if thresholds and not alarm:
        flag = flags_of(MonitorConfig)[thresholds[0]].name
        raise ValueError(f'{flag} has no effect without an alarm; add --mhc-alarm warn')
    if 'alarm_saturation' in values and residual_type in ('hc', 'gated'):
        raise ValueError(
            f'--mhc-alarm-saturation has no effect with --residual-type {residual_type}, whose '
            'H_res has no logits; drop it or set --residual-type mhc'
        )
    return MonitorConfig(
        **{'interval': args.log_interval, 'alarm_gain': ALARM_GAINS[residual_type], **values},
        stops_at_nan=bool(getattr(args, 'mhc_alarm_stops_at_nan', False)),
    )


def resolve_monitor(args: argparse.Namespace) -> MonitorConfig | None:
    """Check the flags against the other arguments, and take Megatron's NaN check over.

    That check ends the run on the one rank that sees the NaN first, while the others still wait for
    its messages: none could tell the layer. The alarm looks at the gradient norm instead, which
    every rank has at the end of the step, and is as fatal.

    Raises:
        ValueError: flags that contradict each other, or that have no effect.
    """
    monitor = monitor_config_from_args(args)
    if monitor is None:
        return None
    writer = getattr(args, 'tensorboard_dir', None) or getattr(args, 'wandb_project', None)
    if monitor.writes and not writer:
        raise ValueError(
            '--mhc-monitor has nowhere to write: add --tensorboard-dir or --wandb-project; '
            '--mhc-alarm alone needs neither'
        )
    if monitor.alarm != 'off' and getattr(args, 'check_for_nan_in_loss_and_grad', False):
        args.check_for_nan_in_loss_and_grad = False
        args.mhc_alarm_stops_at_nan = True
        announce(
            f"--mhc-alarm {monitor.alarm} takes over Megatron's check for NaN in loss and "
            'gradients: such a run ends after its step, and the alarm names the layer'
        )
    return monitor_config_from_args(args)
