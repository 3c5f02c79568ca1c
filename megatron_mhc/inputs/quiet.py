"""Keeps from the user what a library prints, warns of and logs while we ask it something."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No standard output, warnings or log lines below an error; what is raised is heard."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
