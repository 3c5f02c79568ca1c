"""Every peer the bench knows; each is imported if it is installed, and skipped if not.

To add one: a file ``bench_peer_<name>.py`` with a ``Contender`` (see ``bench_contender``), and a
line here. The first paragraph of its docstring is its row of the README's table.
"""

from __future__ import annotations

from bench_contender import Contender, first_line
from bench_peer_liger import Liger, LigerHalfPhi
from bench_peer_lucidrains import Lucidrains
from bench_peer_megatron import Megatron
from bench_peer_te import TransformerEngine, TransformerEngineBuffer, TransformerEngineSplitK
from bench_peer_tilekernels import TileKernels, TileKernelsPerOp

PEERS: tuple[type[Contender], ...] = (
    TileKernels,
    TileKernelsPerOp,
    TransformerEngine,
    TransformerEngineSplitK,
    TransformerEngineBuffer,
    Liger,
    LigerHalfPhi,
    Megatron,
    Lucidrains,
)


def availability(kind: type[Contender]) -> tuple[bool, str]:
    """``kind.available()``, where an exception is a reason like any other."""
    try:
        return kind.available()
    except Exception as error:  # noqa: BLE001  a broken installation must not stop the bench
        return False, first_line(error)
