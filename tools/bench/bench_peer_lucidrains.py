"""lucidrains' hyper-connections: a check of semantics only, and only of Sinkhorn-Knopp.

Columns first, rows last, max-shifted: our order. Its projections are per stream instead of over
all of them, so its mapping is another function, and it is eager torch: no time is reported.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

from torch import Tensor

from megatron_mhc.kernels.peers.contender import Contender


class Lucidrains(Contender):
    """hyper-connections: semantics of Sinkhorn only."""

    name = 'lucidrains'
    timed = False
    without = ('sublayer', 'layer', 'fused_edge', 'mapping', 'pre', 'post')

    @classmethod
    def available(cls) -> tuple[bool, str]:
        for module in ('hyper_connections', 'einops'):
            if importlib.util.find_spec(module) is None:
                return False, f'{module} is not installed; pip install hyper-connections'
        return True, f'hyper-connections {version("hyper-connections")}'

    def sinkhorn(self, logits: Tensor) -> Tensor:
        from hyper_connections.manifold_constrained_hyper_connections import sinkhorn_knopps

        return sinkhorn_knopps(logits, iters=self.case.iterations)
