"""What a value may be: one wording for the flags of commands and for the settings of the API.

The ``check_...`` raise a ValueError that names the flag or argument, its value and what was wanted;
``integer``, ``number`` and ``input_file`` make types for argparse, which puts the flag in front.
"""

from __future__ import annotations

import argparse
import math
import os
import stat
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, overload

# Beyond these a value is a slip: no machine has so many, and fp32 no such factor to multiply with.
MOST_TOKENS = 2**31 - 1
MOST_WIDTH = 2**20
MOST_LAYERS = 10_000
MOST_RANKS = 2**20
MOST_STREAMS = 64
MOST_ITERATIONS = 10_000
MOST_FACTOR = 1e9
# torch's generators take seeds of 64 bits; ours are shifted by 20 to make room for a sublayer.
MOST_SEED = 2**43 - 1


def flag_of(name: str) -> str:
    """The command line's name of an argument: ``num_layers`` is ``--num-layers``."""
    return '--' + name.replace('_', '-')


def shown(value: Any) -> str:
    """``value`` for a message: a string as it is, anything long cut short."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:
        # Python does not print integers of more than 4300 digits.
        text = f'an integer of {value.bit_length()} bits'
    return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'


def check_integer(
    name: str, value: Any, least: int, most: int, remedy: str, words: tuple[str, ...] = ()
) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least`` to ``most``, or a word."""
    if value in words:
        return
    if not isinstance(value, int) or type(value) is bool or not least <= value <= most:
        what = f'{", ".join(words)} or an integer' if words else 'an integer'
        raise ValueError(f'{name} {shown(value)}: {_wanted(what, least, most)}; {remedy}')


def check_number(
    name: str, value: Any, least: float, most: float, remedy: str, above: bool = False
) -> None:
    """Raise ValueError unless ``value`` is a finite number from ``least``, or above it, on."""
    if not is_number(value) or not least <= value <= most or (above and value == least):
        wanted = _wanted('a finite number', least, most, above)
        raise ValueError(f'{name} {shown(value)}: {wanted}; {remedy}')


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False: ``'no'`` would count as true."""
    if type(value) is not bool:
        raise ValueError(f'{name} {value!r}: wanted a bool; give True or False')


if TYPE_CHECKING:

    @overload
    def integer(
        least: int | None = None, most: int = MOST_TOKENS, remedy: str = ''
    ) -> Callable[[str], int]: ...

    @overload
    def integer(
        least: int | None = None,
        most: int = MOST_TOKENS,
        remedy: str = '',
        *,
        words: tuple[str, ...],
    ) -> Callable[[str], int | str]: ...


def integer(
    least: int | None = None, most: int = MOST_TOKENS, remedy: str = '', words: tuple[str, ...] = ()
) -> Callable[[str], int | str]:
    """A type for argparse: an integer in digits, or one of ``words``.

    Without ``least`` any integer is let through, for a setting that is checked with its reason.
    """

    def parsed(text: str) -> int | str:
        if text in words:
            return text
        value = _converted(int, text)
        if value is None or (least is not None and not least <= value <= most):
            wanted = _wanted('an integer', least, most)
            others = f' or {", ".join(words)}' if words else ''
            tail = remedy or ('give it in digits' if value is None else 'give one in that range')
            raise argparse.ArgumentTypeError(f'{shown(text)}: {wanted}{others}; {tail}')
        return value

    return parsed


def number(
    least: float | None = None,
    most: float = MOST_FACTOR,
    remedy: str = 'give a number such as 0.5',
    above: bool = False,
) -> Callable[[str], float]:
    """A type for argparse: a finite number, from ``least`` on or above it."""

    def parsed(text: str) -> float:
        value = _converted(float, text)
        if (
            value is None
            or not math.isfinite(value)
            or (least is not None and not least <= value <= most)
            or (above and value == least)
        ):
            wanted = _wanted('a finite number', least, most, above)
            raise argparse.ArgumentTypeError(f'{shown(text)}: {wanted}; {remedy}')
        return value

    return parsed


def input_file(text: str) -> Path:
    """A type for argparse: a file that can be read; a pipe or a device could keep us for ever."""
    path = Path(text)
    try:
        kind = path.stat().st_mode
        problem = None if stat.S_ISREG(kind) else 'not a file'
        if problem is None and not os.access(path, os.R_OK):
            problem = 'not readable'
    except (OSError, ValueError) as error:
        problem = getattr(error, 'strerror', None) or str(error)
    if problem is not None:
        raise argparse.ArgumentTypeError(f'{shown(text)}: {problem}; name a file to read')
    return path


def environment_integer(name: str, default: int) -> int:
    """An environment variable that a launcher sets.

    Raises:
        ValueError: it is no integer.
    """
    value = _converted(int, os.environ.get(name, str(default)))
    if value is None:
        raise ValueError(
            f'{name}={shown(os.environ[name])}: wanted an integer, as torchrun sets it; unset it'
        )
    return value


def _converted[Number](kind: Callable[[str], Number], text: str) -> Number | None:
    try:
        return kind(text)
    except ValueError:
        return None


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite int or float."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and type(value) is not bool


def _wanted(what: str, least: float | None, most: float, above: bool = False) -> str:
    if least is None:
        return f'wanted {what}'
    end = f'{most:g}' if isinstance(most, float) else str(most)
    return f'wanted {what} ' + (
        f'above {least}, at most {end}' if above else f'from {least} to {end}'
    )
