"""Diagonal H_res: each stream forgets at a rate of its own, and none mixes with another."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold

KEPT = 6.0  # sigmoid(6) = 0.9975


class Diagonal(Manifold):
    """``diag(sigmoid(logits))``: n logits, the 2-norm below 1 (PaddleFleet's dHC has this form).

    Signals shrink with depth, by ``0.9975^L`` where all L sublayers stay as they start. No matrix
    here averages streams, so both presets start near I; where PaddleFleet starts was not found.
    """

    doubly_stochastic = False

    @property
    def num_logits(self) -> int:
        return self.n

    def matrix(self, logits: Tensor) -> Tensor:
        return torch.diag_embed(logits.sigmoid())

    def bias(self, preset: str) -> Tensor:
        return torch.full((self.n,), KEPT, device='cpu')
