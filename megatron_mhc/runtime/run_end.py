"""What an exception that ends a rank is printed as: our line where we know better than Megatron."""

from __future__ import annotations

import functools
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

from megatron_mhc.runtime import failed_save, lost_peer

_watched = False


def watch() -> None:
    """Look at the exceptions that end this process; called once process groups exist.

    A second call does nothing.
    """
    global _watched
    if not _watched:
        _watched = True
        lost_peer.enter()
        sys.excepthook = functools.partial(_end, sys.excepthook)


def _end(
    previous: Callable[..., Any],
    kind: type[BaseException],
    error: BaseException,
    trace: types.TracebackType | None,
) -> None:
    line = failed_save.explain(error, trace)
    first = lost_peer.last_words(error, line or failed_save.cause(error))
    if line is not None and first is None:
        print(f'{pathlib.Path(sys.argv[0]).name}: error: {line}', file=sys.stderr, flush=True)
        return
    if first is not None:
        # Printed below the traceback, where it is read first.
        error.add_note(f'[megatron-mhc] {first}')
    previous(kind, error, trace)
