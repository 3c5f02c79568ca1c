"""H_res = I: streams meet only where sublayers read them (the ablation that others call iHC)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold


class Identity(Manifold):
    """No logits, no parameters: the cheapest of them."""

    @property
    def num_logits(self) -> int:
        return 0

    def matrix(self, logits: Tensor) -> Tensor:
        identity = torch.eye(self.n, dtype=logits.dtype, device=logits.device)
        return identity.expand(*logits.shape[:-1], self.n, self.n)

    def bias(self, preset: str) -> Tensor:
        return torch.zeros(0, device='cpu')
