"""Sinkhorn-Knopp projection onto doubly stochastic matrices (mHC, arXiv 2512.24880, Eq 9).

A pass divides columns and rows by their sums, which lie between 1/n and n after the first one, so
that an entry grows by n^2 a pass at most. What fp32 cannot hold at the start of a pass therefore
stays negligible for some passes, but not for all: where the large entries admit no permutation, one
of e^-500 becomes 1 in the end. So the matrix is taken up again from its logarithm every few passes.

The gradient is that of the unrolled passes, carried as that of the logarithms: T_c and T_r then are
G - M * (sums of G), without a division by entries that may be tiny.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.reference.precision import at_least_fp32, without_autocast

COLUMNS, ROWS = 0, 1


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
        h_res: Tensor = _Sinkhorn.apply(m, iterations)
        return h_res.movedim((0, 1), (-2, -1))


def passes_between_logarithms(n: int) -> int:
    """How many passes can do without: n^2 to this power is e^80, and fp32 ends at e^-103."""
    return max(1, int(40 / math.log(max(n, 2))))


class _Sinkhorn(Function):
    """Logits ``[n, n, ...]`` -> H_res. Saves the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        return sinkhorn_passes(logits, iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return sinkhorn_gradient(logits, grad, ctx.iterations), None


def sinkhorn_passes(logits: Tensor, iterations: int) -> Tensor:
    """H_res of logits, both ``[n, n, ...]`` in fp32 or fp64."""
    _, m, log_m = _first_pass(logits)
    *_, (m, passes) = _stretches(m, log_m, iterations - 1)
    for _ in range(passes):
        _, m = _next_pass(m)
    return m


def sinkhorn_gradient(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    """dL/dlogits from ``grad`` = dL/dH_res, all ``[n, n, ...]``."""
    columns, first, log_m = _first_pass(logits)
    stretches = list(_stretches(first, log_m, iterations - 1))
    last = True
    for m, passes in reversed(stretches):
        steps = []
        for _ in range(passes):
            a, m = _next_pass(m)
            steps.append((a, m))
        if last:
            # dL/dlog M from here on; in the order of m in memory, for all the passes
            grad, last = grad.contiguous() * m, False
        for a, m in reversed(steps):
            grad = _through_pass(grad, a, m)
    return _through_pass(grad, columns, first)


def _first_pass(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T_c(exp(logits)), T_r of that, and its logarithm: no exp overflows, no sum underflows.

    Halves: the difference of two finite logits need not be finite.
    """
    half = 0.5 * logits
    half -= half.amax(COLUMNS, keepdim=True)
    half -= 0.5 * (2 * half).exp_().sum(COLUMNS, keepdim=True).log_()
    columns = (2 * half).exp_()
    half -= half.amax(ROWS, keepdim=True)
    log_m = half.mul_(2)
    m = log_m.exp()
    sums = m.sum(ROWS, keepdim=True)
    return columns, m.div_(sums), log_m.sub_(sums.log_())


def _next_pass(m: Tensor) -> tuple[Tensor, Tensor]:
    """T_c(M), and T_r of that."""
    a = m / m.sum(COLUMNS, keepdim=True)
    return a, a / a.sum(ROWS, keepdim=True)


def _stretches(m: Tensor, log_m: Tensor, passes: int) -> Iterator[tuple[Tensor, int]]:
    """Matrices taken up from their logarithm, each with the number of passes that follow it."""
    span = passes_between_logarithms(m.shape[0])
    while passes > span:
        yield m, span
        columns, rows = torch.ones_like(m[:1]), torch.ones_like(m[:, :1])
        for _ in range(span):
            c = m.sum(COLUMNS, keepdim=True)
            m = m / c
            r = m.sum(ROWS, keepdim=True)
            m = m / r
            columns, rows = columns * c, rows * r
        log_m = log_m - columns.log() - rows.log()
        m, passes = log_m.exp(), passes - span
    yield m, passes


def _through_pass(grad: Tensor, a: Tensor, m: Tensor) -> Tensor:
    """dL/dlog of what went into a pass, in place of that of its result m; a: after its T_c."""
    grad.addcmul_(m, grad.sum(ROWS, keepdim=True), value=-1)
    return grad.addcmul_(a, grad.sum(COLUMNS, keepdim=True), value=-1)
