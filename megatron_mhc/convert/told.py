"""What a conversion of any kind hands over to be told, as text or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Told(NamedTuple):
    """A conversion, done.

    Attributes:
        plain: what was done, as plain values.
        tell: prints the same.
        then: what to do with the output, in one line.
    """

    plain: dict[str, Any]
    tell: Callable[[], None]
    then: str


def tell_verified(found: dict[str, float]) -> None:
    """Of a comparison of logits, if there was one."""
    if found:
        print(
            'verified: largest difference of {compared} logits {difference:.3e}, the largest of '
            'which is {largest:.3e}'.format(**found)
        )
