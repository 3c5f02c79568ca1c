"""Whether a run is healthy: what is wrong, in which sublayer, since which iteration.

The thresholds are the alarm's, those of the run's own command line where the events have it. What
is wrong at the last report makes a run sick; what was wrong and is over, or is not yet the alarm's
matter, is to be watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from megatron_mhc.monitor import checks
from megatron_mhc.monitor.finding import HEALTHY, LEVELS, Finding
from megatron_mhc.monitor.runs import Run, is_hc
from megatron_mhc.settings.flags_monitor import ALARM_GAINS, MonitorConfig

UNKNOWN = 'there is no report of --mhc-monitor, so no more is known'


def verdict(run: Run) -> list[Finding]:
    """What all checks found, the worst first."""
    settings = alarm_settings(run)
    found = [*checks.finite(run)]
    if run.iteration is not None:
        found += [*checks.gains(run, settings), *checks.saturation(run, settings)]
        found += [*checks.streams(run, settings), *checks.writes(run)]
    return sorted(found, key=lambda finding: -LEVELS.index(finding.level))


def level(findings: Iterable[Finding]) -> str:
    """The worst of them."""
    return max((finding.level for finding in findings), key=LEVELS.index)


def line(run: Run, findings: list[Finding]) -> str:
    """``NAME: sick at iteration 20: what is wrong``; all that was checked where nothing is."""
    worst = level(findings)
    said = [finding.text for finding in findings if finding.level != HEALTHY or worst == HEALTHY]
    if run.iteration is None:
        said.append(UNKNOWN)
    return f'{run.label}: {worst} at iteration {run.last}: {"; ".join(said)}'


def alarm_settings(run: Run) -> MonitorConfig:
    """The thresholds of the run's alarm, the defaults where it had none."""
    values: dict[str, Any] = {'alarm_gain': ALARM_GAINS['hc' if is_hc(run) else 'mhc']}
    for name in ('alarm_gain', 'alarm_saturation', 'alarm_rank'):
        # A flag that was not given is the text None.
        with contextlib.suppress(KeyError, ValueError):
            values[name] = float(run.options[f'mhc_{name}'])
    return MonitorConfig(interval=1, **values)
