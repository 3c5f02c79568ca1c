"""The words that a study takes: light, for ``--help``."""

from __future__ import annotations

from megatron_mhc.settings.names import RESIDUAL_TYPES

# Those of ``PRESETS``.
HARDWARE = ('a100', 'h100', 'h200', 'b200')
# Types of residual connections that a study has the costs of.
STUDIED = ('standard', 'mhc')


def only_studied(residual_type: str) -> str:
    """Why a study does not take another type, and what to use."""
    known = residual_type in RESIDUAL_TYPES
    why = 'a study does not know its kernels and memory' if known else 'there is no such type'
    return f'{why}; use {" or ".join(STUDIED)}'
