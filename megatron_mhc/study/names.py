"""The words that a study takes: light, for ``--help``."""

from __future__ import annotations

from megatron_mhc.inputs.values import number
from megatron_mhc.settings.names import RESIDUAL_TYPES

# Those of ``PRESETS``.
HARDWARE = ('a100', 'h800', 'h100', 'h200', 'b200', 'gb200', 'gb300')
# Tokens of a training beyond which the number is a slip.
MOST_TRAINED = 1e18
# Of a batch that stays, and of one that grows with the GPUs.
SCALING = ('strong', 'weak')
# Types of residual connections that a study has the costs of.
STUDIED = ('standard', 'hc', 'mhc')
STUDIED_WORDS = f'{", ".join(STUDIED[:-1])} or {STUDIED[-1]}'
# What linear layers multiply in.
PRECISIONS = ('bf16', 'fp8')
# Of ``--segments``, beside segments: --recompute-granularity full, one layer at a time.
FULL = 'full'


def only_studied(residual_type: str) -> str:
    """Why a study does not take another type, and what to use."""
    known = residual_type in RESIDUAL_TYPES
    why = 'a study does not know its kernels and memory' if known else 'there is no such type'
    return f'{why}; use {STUDIED_WORDS}'


def token_count(text: str) -> float:
    """A type for argparse: tokens as a number, or with K, M, B or T behind it.

    Raises:
        argparse.ArgumentTypeError: no such number.
    """
    factors = {'K': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}
    digits, factor = text, 1.0
    if text[-1:].upper() in factors:
        digits, factor = text[:-1], factors[text[-1].upper()]
    parsed = number(0, MOST_TRAINED, 'give a number such as 2e11, 300B or 1T', above=True)
    try:
        return parsed(str(float(digits) * factor))
    except ValueError:
        return parsed(text)
