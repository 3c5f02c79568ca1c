"""Names of the peers whose Triton kernels the model can predict; light enough for help."""

from __future__ import annotations

PEERS = ('te', 'te-split-k', 'te-buffer', 'liger', 'liger-half-phi', 'megatron')


def known(name: str) -> str:
    """The name as ``PEERS`` has it; ``all`` stays.

    Raises:
        ValueError: no such peer; the message names those there are.
    """
    if name in (*PEERS, 'all'):
        return name
    raise ValueError(f'{name}: the model knows no such peer; take all, or of {" ".join(PEERS)}')
