"""Command-line flags of the monitors, and the settings that they describe."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.inputs.values import (
    MOST_TOKENS,
    check_integer,
    check_number,
    flag_of,
    integer,
    number,
)

ALARMS = ('off', 'warn', 'stop')
# By type: mHC's composite gain was at most 1.6 in the paper and cannot exceed n; HC's grows with
# depth from the start and was 3000 where the paper's run had become unstable.
ALARM_GAINS = {'mhc': 3.0, 'hc': 100.0}
TOKENS = 1024
# Gains are fp32: above this an alarm could not be raised.
GREATEST_GAIN = 1e38
FLAGS = (
    'mhc_monitor',
    'mhc_monitor_interval',
    'mhc_monitor_tokens',
    'mhc_monitor_per_layer',
    'mhc_alarm',
    'mhc_alarm_gain',
)


@dataclass(frozen=True)
class MonitorConfig:
    """Settings of the monitors.

    Args:
        interval: iterations between two reports.
        tokens: K, at most so many tokens a rank are measured at a report.
        per_layer: write each sublayer's values, not only those over all.
        alarm: ``off``, ``warn`` or ``stop``.
        alarm_gain: amax gain magnitude, single or composite, above which the alarm is raised.
        stops_at_nan: end the run when the gradient norm is not finite, whatever ``alarm`` says.
    """

    interval: int
    tokens: int = TOKENS
    per_layer: bool = False
    alarm: str = 'off'
    alarm_gain: float = ALARM_GAINS['mhc']
    stops_at_nan: bool = False


def add_monitor_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``monitors`` group to ``parser`` and return it."""
    group = parser.add_argument_group(
        'monitors',
        "Stability of hyper-connections, as mhc/... through Megatron's TensorBoard and W&B writers "
        '(megatron-mhc report draws them). Measured in the first microbatch of the step that is '
        'reported; nothing waits for the device before that.',
    )
    group.add_argument(
        '--mhc-monitor',
        action='store_const',
        const=True,
        help='write gains of H_res, single and composite, its distance from doubly stochastic, '
        'entropies of H_pre and H_post, stream norms and similarity, gradient norm of the mapping '
        'parameters, non-finite counts (default: off)',
    )
    group.add_argument(
        '--mhc-monitor-interval',
        type=integer(),
        metavar='N',
        help='iterations between two reports (default: --log-interval)',
    )
    group.add_argument(
        '--mhc-monitor-tokens',
        type=integer(),
        metavar='K',
        help=f'tokens measured a report and rank, evenly spaced in the microbatch (default: '
        f'{TOKENS})',
    )
    group.add_argument(
        '--mhc-monitor-per-layer',
        action='store_const',
        const=True,
        help='write the scalars of every sublayer too (default: over all sublayers only)',
    )
    group.add_argument(
        '--mhc-alarm',
        choices=ALARMS,
        help='say which layer first had non-finite streams, maps, outputs or mapping gradients, or '
        "a gain above --mhc-alarm-gain; stop also ends all ranks, with status 3. Takes Megatron's "
        'own NaN check over, which would end the run before the layer is known (default: off)',
    )
    group.add_argument(
        '--mhc-alarm-gain',
        type=number(),
        metavar='GAIN',
        help='amax gain, single or composite, that raises the alarm (default: 3 for mhc, whose '
        'paper saw at most 1.6, 100 for hc, whose paper saw 3000)',
    )
    return parser


def monitor_config_from_args(args: argparse.Namespace) -> MonitorConfig | None:
    """The settings that ``args`` describes; None where nothing is monitored.

    Raises:
        ValueError: a value is out of range, or a flag has no effect.
    """
    given = [name for name in FLAGS if getattr(args, name, None) is not None]
    if not given:
        return None
    residual_type = getattr(args, 'residual_type', 'standard')
    if residual_type == 'standard':
        raise ValueError(
            f'{flag_of(given[0])} has no effect with --residual-type standard, which has no maps '
            'to monitor; drop it or set --residual-type mhc'
        )
    alarm = getattr(args, 'mhc_alarm', None) or 'off'
    if not args.mhc_monitor and alarm == 'off':
        raise ValueError(
            f'{flag_of(given[0])} has no effect without --mhc-monitor or --mhc-alarm warn; add one'
        )
    if args.mhc_alarm_gain is not None and alarm == 'off':
        raise ValueError('--mhc-alarm-gain has no effect without an alarm; add --mhc-alarm warn')
    for name in ('mhc_monitor_interval', 'mhc_monitor_tokens'):
        value = getattr(args, name)
        if value is not None:
            check_integer(flag_of(name), value, 1, MOST_TOKENS, 'leave it out for the default')
    gain = args.mhc_alarm_gain
    if gain is not None:
        check_number(
            *('--mhc-alarm-gain', gain, 1, GREATEST_GAIN),
            '1 is the gain of a doubly stochastic H_res; the mHC paper saw 1.6 for mHC and 3000 '
            'for HC',
            above=True,
        )
    return MonitorConfig(
        interval=args.mhc_monitor_interval or args.log_interval,
        tokens=args.mhc_monitor_tokens or TOKENS,
        per_layer=bool(args.mhc_monitor_per_layer),
        alarm=alarm,
        alarm_gain=ALARM_GAINS[residual_type] if gain is None else gain,
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
    writes = getattr(args, 'tensorboard_dir', None) or getattr(args, 'wandb_project', None)
    if args.mhc_monitor and not writes:
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
