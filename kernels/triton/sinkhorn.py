"""Sinkhorn-Knopp and its gradient (mHC, Eq 9): one small matrix a token, all passes in registers.

The gradient is that of the T unrolled passes. Nothing is stored for it: backward runs forward again
up to a few restart points and from these to each pass in turn.
"""

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.triton.launch import Tile, cdiv, launch

# n -> tile: n * n values a token.
FORWARD = {1: Tile(128), 2: Tile(128), 4: Tile(64), 8: Tile(16)}
BACKWARD = {1: Tile(128), 2: Tile(128), 4: Tile(32), 8: Tile(16, num_warps=8)}
# Passes between two restart points are repeated; more of them would take more registers.
RESTARTS = tl.constexpr(4)


@triton.jit
def first_pass(logits):
    """T_r(T_c(exp(logits))) from logarithms: no exp overflows, no column or row sums to zero."""
    m = logits - tl.max(logits, 1)[:, None, :]
    m = m - tl.log(tl.sum(tl.exp(m), 1))[:, None, :]
    m = tl.exp(m - tl.max(m, 2)[:, :, None])
    return m / tl.sum(m, 2)[:, :, None]


@triton.jit
def next_pass(m):
    """T_r(T_c(m)); columns are axis 1, rows axis 2."""
    m = m / tl.sum(m, 1)[:, None, :]
    return m / tl.sum(m, 2)[:, :, None]


@triton.jit
def sinkhorn(logits, ITERATIONS: tl.constexpr):
    m = first_pass(logits)
    for _ in range(ITERATIONS - 1):
        m = next_pass(m)
    return m


@triton.jit
def sinkhorn_gradient(grad, logits, ITERATIONS: tl.constexpr):
    """dL/dlogits from dL/dH_res, both ``[BT, n, n]``."""
    SPAN: tl.constexpr = (ITERATIONS - 1 + RESTARTS - 1) // RESTARTS
    m = first_pass(logits)
    starts = (m,)
    for _ in tl.static_range(1, RESTARTS):
        for _ in range(SPAN):
            m = next_pass(m)
        starts = starts + (m,)
    for part in tl.static_range(RESTARTS - 1, -1, -1):
        # The last part may hold fewer passes than the others, or none.
        passes = tl.maximum(tl.minimum(SPAN, ITERATIONS - 1 - part * SPAN), 0)
        for done in range(passes):
            m = starts[part]
            for _ in range(passes - 1 - done):
                m = next_pass(m)
            # T_c: a = m / c, then T_r: out = a / r
            c = tl.sum(m, 1)
            a = m / c[:, None, :]
            r = tl.sum(a, 2)
            out = a / r[:, :, None]
            grad = (grad - tl.sum(grad * out, 2)[:, :, None]) / r[:, :, None]
            grad = (grad - tl.sum(grad * a, 1)[:, None, :]) / c[:, None, :]
    # first pass: softmax over each row of log_softmax over each column
    out = starts[0]
    grad = out * (grad - tl.sum(grad * out, 2)[:, :, None])
    e = tl.exp(logits - tl.max(logits, 1)[:, None, :])
    e = e / tl.sum(e, 1)[:, None, :]
    return grad - e * tl.sum(grad, 1)[:, None, :]


@triton.jit
def matrix_offsets(t, STRIDE: tl.constexpr, N: tl.constexpr):
    """Offsets of row-major ``[n, n]`` matrices that lie ``STRIDE`` apart, ``[BT, n, n]``."""
    i = tl.arange(0, N)
    return t[:, None, None] * STRIDE + (i[:, None] * N + i[None, :])[None, :, :]


@triton.jit
def sinkhorn_forward_kernel(
    logits_ptr, res_ptr, T, ITERATIONS: tl.constexpr, N: tl.constexpr, BT: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    at, mask = matrix_offsets(t, N * N, N), (t < T)[:, None, None]
    logits = tl.load(logits_ptr + at, mask=mask, other=0.0)
    tl.store(res_ptr + at, sinkhorn(logits, ITERATIONS), mask=mask)


@triton.jit
def sinkhorn_backward_kernel(
    grad_ptr, logits_ptr, out_ptr, T, ITERATIONS: tl.constexpr, N: tl.constexpr, BT: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    at, mask = matrix_offsets(t, N * N, N), (t < T)[:, None, None]
    logits = tl.load(logits_ptr + at, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, sinkhorn_gradient(grad, logits, ITERATIONS), mask=mask)


def sinkhorn_forward(logits: torch.Tensor, iterations: int) -> torch.Tensor:
    """fp32 ``[T, n, n]`` logits -> H_res of the same shape."""
    tokens, n, _ = logits.shape
    tile, res = FORWARD[n], torch.empty_like(logits)
    launch(
        sinkhorn_forward_kernel,
        (cdiv(tokens, tile.tokens),),
        *(logits, res, tokens),
        tile=tile,
        ITERATIONS=iterations,
        N=n,
        BT=tile.tokens,
    )
    return res


def sinkhorn_backward(grad: torch.Tensor, logits: torch.Tensor, iterations: int) -> torch.Tensor:
    """dL/dH_res and the logits -> dL/dlogits, all fp32 ``[T, n, n]``."""
    tokens, n, _ = logits.shape
    tile, out = BACKWARD[n], torch.empty_like(logits)
    launch(
        sinkhorn_backward_kernel,
        (cdiv(tokens, tile.tokens),),
        *(grad, logits, out, tokens),
        tile=tile,
        ITERATIONS=iterations,
        N=n,
        BT=tile.tokens,
    )
    return out
