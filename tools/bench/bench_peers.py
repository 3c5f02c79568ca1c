"""Every peer the bench knows; each is imported if it is installed, and skipped if not.

To add one: a file ``bench_peer_<name>.py`` with a ``Contender`` (see ``bench_contender``), and a
line here. The first paragraph of its docstring is its row of the README's table.
"""

from __future__ import annotations

from bench_peer_lucidrains import Lucidrains
from bench_peer_tilekernels import TileKernels, TileKernelsPerOp

from megatron_mhc.kernels.peers.contender import Contender
from megatron_mhc.kernels.peers.liger import Liger, LigerHalfPhi
from megatron_mhc.kernels.peers.megatron import Megatron
from megatron_mhc.kernels.peers.te import (
    TransformerEngine,
    TransformerEngineBuffer,
    TransformerEngineSplitK,
)

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
