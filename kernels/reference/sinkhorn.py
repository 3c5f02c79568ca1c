"""Sinkhorn-Knopp projection onto doubly stochastic matrices (mHC, arXiv 2512.24880, Eq 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.kernels.reference.precision import at_least_fp32, without_autocast


def sinkhorn_ref(logits: Tensor, iterations: int = 20) -> Tensor:
    """M(0) = exp(logits); M(t) = T_r(T_c(M(t-1))): columns are normalised first, rows last.

    Row sums are therefore exact to rounding; column sums carry what is left after ``iterations``.

    Args:
        logits: ``[..., n, n]``.
        iterations: number of column-then-row passes, at least 1 (paper: 20).

    Returns:
        ``[..., n, n]`` in fp32 (fp64 for fp64 logits).
    """
    with without_autocast(logits.device):
        # [n, n, ...]: the sums run over leading axes, so that tokens stay contiguous.
        m = at_least_fp32(logits).movedim((-2, -1), (0, 1)).contiguous()
        # The first pass in log space: exp never overflows, and no row can underflow to 0 / 0.
        # T_c(exp(L)) = softmax over a column; T_r of it = softmax over the row of its logarithm.
        m = torch.softmax(torch.log_softmax(m, dim=0), dim=1)
        for _ in range(iterations - 1):
            m = m / m.sum(dim=0, keepdim=True)
            m = m / m.sum(dim=1, keepdim=True)
        return m.movedim((0, 1), (-2, -1))
