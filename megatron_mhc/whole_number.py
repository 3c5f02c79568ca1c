"""Counts on the command line: whole numbers that something can be made of."""

from __future__ import annotations

import argparse

# No layout, plan or terminal has more of anything.
LARGEST = 10**9
_SHOWN = 20


def count(text: str, least: int = 1) -> int:
    """``text`` as a number from ``least`` to ``LARGEST``, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none; shows its first digits.
    """
    # Python reads no number of thousands of digits, and floats none of hundreds.
    if text.isascii() and text.isdecimal() and len(text) <= len(str(LARGEST)):
        if least <= int(text) <= LARGEST:
            return int(text)
    shown = text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'
    raise argparse.ArgumentTypeError(
        f'{shown}: a number; give an integer of at least {least} and at most {LARGEST}'
    )
