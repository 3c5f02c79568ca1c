"""What Attention Residuals cannot be combined with, beside what no residual topology can."""

from __future__ import annotations

from megatron_mhc.settings.constraint import Constraint, Refusals

_ROWS = (
    Constraint(
        '--mhc-post-stream high',
        lambda get: get('mhc_post_stream') == 'high',
        'the sum has one stream, and the next read comes right after it, with nothing to overlap',
        'drop the flag',
    ),
    Constraint(
        '--mhc-monitor / --mhc-alarm',
        lambda get: bool(get('mhc_monitor')) or get('mhc_alarm') not in (None, 'off'),
        'there is no H_res to monitor',
        'drop the flag, or use --residual-type mhc',
    ),
)
ATTENTION = Refusals('--residual-type {}', 'use --residual-type standard', _ROWS, ('attention',))
