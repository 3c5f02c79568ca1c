"""The seams that ``megatron-mhc patch`` has put into the user's tree, as they are met.

Megatron's modules bring this one in while they are being imported themselves, hence nothing but the
standard library here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Seam:
    """A seam in the tree: what it was put on, what it calls, the signature its user vouched for.

    ``wrap`` is the factory of the patch that is switched on.
    """

    original: Callable[..., Any]
    current: Callable[..., Any]
    accepted: str | None
    wrap: Callable[..., Any] | None = None

    def switch(self, wrap: Callable[..., Any] | None) -> None:
        """Call through ``wrap(original)`` from now on, or ``original`` alone for None."""
        self.wrap = wrap
        self.current = self.original
        if wrap is not None:
            self.current = functools.wraps(self.original)(wrap(self.original))


PLACED: dict[str, Seam] = {}


def plain(declared: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """The function that stands in a class or module, and what makes it a class method again."""
    if isinstance(declared, classmethod | staticmethod):
        return declared.__func__, type(declared)
    return declared, lambda function: function
