"""An answer as JSON that every reader takes."""

from __future__ import annotations

import json
import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def as_json(found: Any) -> str:
    """``found``, plain values, as JSON; what is not finite, which JSON has no word for, as null."""
    return json.dumps(_finite(found), indent=2, allow_nan=False)


def _finite(found: Any) -> Any:
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    return [*map(_finite, found)] if isinstance(found, list | tuple) else found
