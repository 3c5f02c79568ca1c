"""Flags of the monitors: what they resolve to, and what is refused in one line."""

from __future__ import annotations

import pytest

from megatron_mhc.settings.flags_monitor import monitor_config_from_args

MHC = ('--residual-type', 'mhc')
MONITOR = (*MHC, '--mhc-monitor', '--tensorboard-dir', 'runs')


def test_defaults_by_residual_type(parse):
    assert monitor_config_from_args(parse()) is None
    assert monitor_config_from_args(parse(*MHC)) is None
    settings = monitor_config_from_args(parse(*MONITOR, '--log-interval', '7'))
    assert (settings.interval, settings.tokens, settings.alarm) == (7, 1024, 'off')
    args = parse(*MHC, '--mhc-alarm', 'warn', '--mhc-monitor-interval', '3')
    settings = monitor_config_from_args(args)
    assert (settings.interval, settings.alarm, settings.alarm_gain) == (3, 'warn', 3.0)
    args = parse('--residual-type', 'hc', '--mhc-alarm', 'stop')
    assert monitor_config_from_args(args).alarm_gain == 100.0


def test_the_alarm_takes_the_nan_check_over(parse, capsys):
    args = parse(*MHC, '--mhc-alarm', 'warn')
    assert not args.check_for_nan_in_loss_and_grad
    assert monitor_config_from_args(args).stops_at_nan
    args = parse(*MHC, '--mhc-alarm', 'warn', '--no-check-for-nan-in-loss-and-grad')
    assert not monitor_config_from_args(args).stops_at_nan
    # Monitors by themselves leave it alone.
    assert parse(*MONITOR).check_for_nan_in_loss_and_grad


def test_nothing_is_patched_unless_asked_for(parse):
    from megatron_mhc.patches import engine

    engine.revert(engine_patches())
    parse(*MHC)
    assert not any(name.startswith('monitor') for name in engine.applied())
    parse(*MONITOR)
    assert {p.id for p in engine_patches()} <= set(engine.applied())


def engine_patches():
    from megatron_mhc.patches.registry import MONITOR_PATCHES

    return MONITOR_PATCHES


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('--mhc-monitor',), '--mhc-monitor has no effect with --residual-type standard'),
        (('--mhc-alarm', 'warn'), '--mhc-alarm has no effect with --residual-type standard'),
        ((*MHC, '--mhc-monitor'), 'nowhere to write: add --tensorboard-dir or --wandb-project'),
        ((*MHC, '--mhc-monitor-tokens', '9'), 'no effect without --mhc-monitor or --mhc-alarm'),
        ((*MHC, '--mhc-alarm', 'off'), 'no effect without --mhc-monitor or --mhc-alarm warn'),
        ((*MONITOR, '--mhc-alarm-gain', '5'), '--mhc-alarm-gain has no effect without an alarm'),
        ((*MONITOR, '--mhc-alarm-rank', '1'), '--mhc-alarm-rank has no effect without an alarm'),
        (
            ('--residual-type', 'hc', '--mhc-alarm', 'warn', '--mhc-alarm-saturation', '0.5'),
            '--mhc-alarm-saturation has no effect with --residual-type hc',
        ),
        ((*MHC, '--mhc-alarm', 'warn', '--mhc-alarm-rank', '2'), '--mhc-alarm-rank 2.0: wanted'),
        ((*MONITOR, '--mhc-monitor-interval', '0'), '--mhc-monitor-interval 0: wanted'),
        ((*MONITOR, '--mhc-monitor-tokens', '-1'), '--mhc-monitor-tokens -1: wanted'),
        ((*MHC, '--mhc-alarm', 'warn', '--mhc-alarm-gain', '1'), '--mhc-alarm-gain 1.0: wanted'),
        ((*MHC, '--mhc-alarm', 'loud'), 'argument --mhc-alarm: invalid choice'),
    ],
)
def test_refused_in_one_line(parse, capsys, flags, said):
    with pytest.raises(SystemExit):
        parse(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
