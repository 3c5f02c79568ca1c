"""What a check found, and the reports in which it found it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_mhc.monitor.names import sublayer_name

HEALTHY, WATCH, SICK = LEVELS = ('healthy', 'watch', 'sick')


class Finding(NamedTuple):
    """What one check found.

    Args:
        check: ``finite``, ``gains``, ``saturation``, ``streams`` or ``writes``.
        level: of LEVELS.
        text: in words, with figures.
        value: the figure.
        limit: what it is held against; None for finiteness.
        since: first iteration of the trouble, up to the last report or to ``until``.
        until: last iteration of it, where it is over.
        sublayer: number of the first one in trouble, from 0; None where it is of no sublayer.
    """

    check: str
    level: str
    text: str
    value: float | None = None
    limit: float | None = None
    since: int | None = None
    until: int | None = None
    sublayer: int | None = None

    def as_dict(self, pattern: str = '') -> dict[str, Any]:
        """For JSON, which knows no NaN and no infinity; ``pattern`` of a hybrid model."""
        values = self._asdict()
        if self.value is not None and not math.isfinite(self.value):
            values['value'] = None
        number = self.sublayer
        return values | {'layer': None if number is None else sublayer_name(number, pattern)}


class Spell(NamedTuple):
    """The last unbroken row of reports with trouble.

    Args:
        first, last: its iterations.
        over: whether there was a report without after it.
        sublayers: those in trouble at the last one, ascending.
    """

    first: int
    last: int
    over: bool
    sublayers: list[int]

    @property
    def level(self) -> str:
        return WATCH if self.over else SICK

    @property
    def when(self) -> str:
        if not self.over:
            return f'since iteration {self.first}'
        if self.first == self.last:
            return f'at iteration {self.last}, not any more'
        return f'at iterations {self.first} to {self.last}, not any more'

    def where(self, pattern: str, first: int | None = None) -> str:
        """The sublayer to look at, the first where no other is given, and how many more there are.

        ``layer 2 mlp (and 3 more)``, of a hybrid model with ``pattern``.
        """
        more = len(self.sublayers) - 1
        name = sublayer_name(self.sublayers[0] if first is None else first, pattern)
        return f'{name} (and {more} more)' if more else name


def spell(history: dict[int, Any], is_bad: Callable[[Any], Any]) -> Spell | None:
    """The last spell of trouble; None if there never was any.

    Args:
        history: iteration -> ``[L]``.
        is_bad: ``[L]`` -> a flag for each.
    """
    found: Spell | None = None
    for step, values in history.items():
        bad = [number for number, flag in enumerate(is_bad(values)) if flag]
        if bad:
            first = step if found is None or found.over else found.first
            found = Spell(first, step, False, bad)
        elif found is not None:
            found = found._replace(over=True)
    return found


def place(found: Spell, sublayer: int | None) -> tuple[int, int | None, int | None]:
    """The fields ``since``, ``until`` and ``sublayer``."""
    return found.first, found.last if found.over else None, sublayer
