"""How far long work has come, on stderr, where a person reads it there."""

from __future__ import annotations

import contextlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, doing: str, unit: str = 'it') -> Iterator[Callable[[int], object]]:
    """Gives a function to be told how much more is done; silent where stderr is no terminal.

    Args:
        total: how much there is to do.
        doing: what is done, in front of the bar.
        unit: of ``total``; ``B`` for bytes.
    """
    if not sys.stderr.isatty():
        yield bool
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        with _count(total, doing) as advance:
            yield advance
        return
    options = {'unit': unit, 'unit_scale': unit == 'B'}
    with tqdm(total=total, desc=doing, file=sys.stderr, leave=False, **options) as bar:
        yield bar.update


@contextlib.contextmanager
def _count(total: int, doing: str) -> Iterator[Callable[[int], object]]:
    """``doing: done/total`` on one line, which is gone at the end."""
    done, last = 0, ''

    def advance(more: int) -> None:
        nonlocal done, last
        done += more
        last = f'{doing}: {done}/{total}'
        print(f'\r{last}', end='', file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        print(f'\r{" " * len(last)}\r', end='', file=sys.stderr, flush=True)
