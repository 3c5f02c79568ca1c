"""What the gated residual cannot be combined with, beside what no residual topology can."""

from __future__ import annotations

from megatron_mhc.settings.constraint import Constraint, Refusals

_ROWS = (
    Constraint(
        '--normalization LayerNorm',
        lambda get: get('normalization') not in (None, 'RMSNorm'),
        'its RMSNorm of each stream takes the place of the norms of the layers',
        'add --normalization RMSNorm',
    ),
    Constraint(
        '--fp32-residual-connection',
        lambda get: bool(get('fp32_residual_connection')),
        'the norm that brings fp32 streams to the type of the weights is left out',
        'drop the flag',
    ),
)
GATED = Refusals('--residual-type {}', 'use --residual-type standard', _ROWS, ('gated',))
