"""Which part of a step a picture shows: a window in time, without its middle where too long."""

from __future__ import annotations

from math import floor, log10
from typing import NamedTuple

from megatron_mhc.schedules.timeline import Entry, Timeline

# Pixels or columns of a picture, beyond which nobody follows it, and how short of a step is drawn.
MOST_WIDE, FINEST = 1_000_000, 1e-12


class Window(NamedTuple):
    """A stretch of time, in the unit of the timeline."""

    start: float
    end: float

    @property
    def length(self) -> float:
        """From start to end."""
        return self.end - self.start

    def shows(self, entry: Entry) -> bool:
        """Whether some of ``entry`` is inside; what takes no time is, on the border too."""
        if entry.end > entry.start:
            return entry.start < self.end and entry.end > self.start
        return self.start <= entry.start <= self.end

    def cuts(self, entry: Entry) -> bool:
        """Whether some of ``entry`` is outside."""
        return entry.start < self.start or entry.end > self.end

    def __str__(self) -> str:
        return f'{self.start:.5g} to {self.end:.5g}'


def window_of(timeline: Timeline, start: float | None = None, end: float | None = None) -> Window:
    """The part of the step from ``start`` to ``end``; None for its beginning and its end.

    Raises:
        ValueError: it would be empty; names the flag.
    """
    last = timeline.makespan
    first = start or 0.0
    if first and first >= last:
        raise ValueError(f'--from {first:g}: the step ends at {last:.6g}; give less')
    if end is not None and end <= first:
        raise ValueError(f'--to {end:g}: the picture begins at {first:g}; give more')
    return Window(first, last if end is None else min(end, last))


def panels(window: Window, room: float) -> list[Window]:
    """``window``, or its beginning and its end where it is longer than ``room``.

    A step fills and drains the pipeline at its ends; between them it repeats itself.
    """
    if window.length <= room:
        return [window]
    # Not more digits than one reads.
    grain = 10 ** floor(log10(room / 2)) / 20
    half = floor(room / 2 / grain) * grain
    return [
        Window(window.start, window.start + half),
        Window(window.end - half, window.end),
    ]


def excerpt(timeline: Timeline, shown: list[Window]) -> str:
    """What of the step ``shown`` leaves out, in words; empty where that is nothing."""
    if len(shown) == 1 and shown[0] == window_of(timeline):
        return ''
    words = f'shown: {" and ".join(map(str, shown))} of 0 to {timeline.makespan:.6g}'
    if len(shown) > 1:
        words += f'; left out in between: {Window(shown[0].end, shown[1].start)}'
    return words
