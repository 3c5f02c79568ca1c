"""What single-pass mHC cannot be combined with, beside what no residual topology can."""

from __future__ import annotations

from megatron_mhc.settings.constraint import Constraint, Refusals

_ROWS = (
    Constraint(
        '--mhc-post-stream high',
        lambda get: get('mhc_post_stream') == 'high',
        'the next read comes right after F_post,res, with nothing to overlap',
        'drop the flag',
    ),
)
SINGLE_PASS = Refusals('--mhc-single-pass', 'drop --mhc-single-pass', _ROWS)
