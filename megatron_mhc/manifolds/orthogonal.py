"""Rotations as H_res: norms are kept both ways (the orthogonal family, e.g. arXiv 2602.18308)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.sizes import NUM_LOGITS


class Orthogonal(Manifold):
    """SO(n) by n (n - 1) / 2 angles: a product of rotations, each of two streams.

    Every singular value is 1, so composites of any depth neither grow nor shrink a signal; but
    entries may be negative and rows do not sum to 1. Angles, and not a Cayley transform, since
    they stay orthogonal to rounding however large the logits get. No rotation averages all
    streams, so both presets start from I.
    """

    doubly_stochastic = False

    @property
    def num_logits(self) -> int:
        return NUM_LOGITS['orthogonal'](self.n)

    def matrix(self, logits: Tensor) -> Tensor:
        identity = torch.eye(self.n, dtype=logits.dtype, device=logits.device)
        rows = list(identity.expand(*logits.shape[:-1], self.n, self.n).unbind(-2))
        cosines, sines = logits.cos().unbind(-1), logits.sin().unbind(-1)
        pairs = itertools.combinations(range(self.n), 2)
        for (i, j), cosine, sine in zip(pairs, cosines, sines, strict=True):
            c, s = cosine.unsqueeze(-1), sine.unsqueeze(-1)
            rows[i], rows[j] = c * rows[i] - s * rows[j], s * rows[i] + c * rows[j]
        return torch.stack(rows, dim=-2)

    def bias(self, preset: str) -> Tensor:
        return torch.zeros(self.num_logits, device='cpu')
