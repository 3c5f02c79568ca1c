"""How an answer of several rows is laid out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any


def table(rows: Iterable[Sequence[Any]], sides: str = '<') -> list[str]:
    """A line for each row, every column as wide as its widest cell.

    Args:
        rows: the head first; all of one length.
        sides: ``<`` or ``>`` for each column, the last of them for those after it too.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [
        '  '.join(f'{c:{s}{w}}' for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in cells
    ]
