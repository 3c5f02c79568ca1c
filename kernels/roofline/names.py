"""Names of the GPUs that the model knows, and why not of others; light enough for help."""

from __future__ import annotations

NAMES = ('h200', 'h100', 'a100')
# The one whose predictions ``record.json`` keeps, and whose architecture the gate looks at.
RECORDED = 'h200'
# Others that are asked for, and what stands in the way.
_BLACKWELL = 'its matrix products (tcgen05) run beside the warps, which the model does not describe'
UNKNOWN = dict.fromkeys(('b100', 'b200', 'b300', 'gb200', 'gb300'), _BLACKWELL)


def known(name: str) -> str:
    """The name as ``gpus`` has it.

    Raises:
        ValueError: the model does not know it; the message says why and names those it knows.
    """
    if name.lower() in NAMES:
        return name.lower()
    why = UNKNOWN.get(name.lower(), 'the model has no constants of it with a source')
    raise ValueError(f'{name}: {why}; take one of {" ".join(NAMES)}')
