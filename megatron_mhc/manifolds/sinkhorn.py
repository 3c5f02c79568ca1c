"""Doubly stochastic matrices by Sinkhorn-Knopp (mHC, arXiv 2512.24880, Eq 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc import ops
from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.sizes import NUM_LOGITS

# H_res = Sinkhorn(6 I) has 0.993 on its diagonal at n = 4.
IDENTITY = 6.0


class Sinkhorn(Manifold):
    """n^2 logits; rows sum to 1 to rounding, columns to what 20 passes leave.

    The paper's manifold, and the only one inside the fused ops of ``megatron_mhc.ops``: sublayers
    call those, and not ``matrix``, which is the same projection by itself.
    """

    @property
    def num_logits(self) -> int:
        return NUM_LOGITS['sinkhorn'](self.n)

    def matrix(self, logits: Tensor) -> Tensor:
        return ops.sinkhorn(logits.unflatten(-1, (self.n, self.n)))

    def bias(self, preset: str) -> Tensor:
        diagonal = IDENTITY if preset == 'identity' else 0.0
        return diagonal * torch.eye(self.n, device='cpu').flatten()
