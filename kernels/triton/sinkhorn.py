"""Sinkhorn-Knopp and its gradient (mHC, Eq 9): one small matrix a token, all passes in registers.

The gradient is that of the T unrolled passes. Nothing is stored for it: backward runs forward again
up to a few restart points and from these to each pass in turn. More than SPAN passes are taken up
again from logarithms every SPAN of them; why, ``reference/sinkhorn.py`` says.
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
# From one logarithm to the next, for up to 8 streams; the paper's 20 passes need the first alone.
SPAN = tl.constexpr(19)


@triton.jit
def columns_of(logits):
    """Half of log T_c(exp(logits)): no exp overflows, no sum underflows.

    Halves, since the difference of two finite logits need not be finite.
    """
    half = 0.5 * logits
    half = half - tl.max(half, 1)[:, None, :]
    return half - (0.5 * tl.log(tl.sum(tl.exp(2.0 * half), 1)))[:, None, :]


@triton.jit
def rows_of(half):
    """log of what ``first_pass`` makes, and the sums of its rows before they divide them."""
    log_m = 2.0 * (half - tl.max(half, 2)[:, :, None])
    return log_m, tl.sum(tl.exp(log_m), 2)


@triton.jit
def first_pass(half):
    """T_r(T_c(exp(logits))) from ``columns_of(logits)``."""
    log_m, r = rows_of(half)
    return tl.exp(log_m) * (1.0 / r)[:, :, None]


@triton.jit
def T_c(m):
    return m * (1.0 / tl.sum(m, 1))[:, None, :]


@triton.jit
def T_r(m):
    return m * (1.0 / tl.sum(m, 2))[:, :, None]


@triton.jit
def next_pass(m):
    return T_r(T_c(m))


@triton.jit
def through_pass(grad, a, m):
    """dL/dlog of what went into a pass from dL/dlog of its result m; a is T_c of the former."""
    grad = grad - m * tl.sum(grad, 2)[:, :, None]
    return grad - a * tl.sum(grad, 1)[:, None, :]


@triton.jit
def taken_up(logits, stretches):
    """M after the first pass and ``stretches`` times SPAN more, from its logarithm."""
    log_m, r = rows_of(columns_of(logits))
    log_m = log_m - tl.log(r)[:, :, None]
    for _ in range(stretches):
        m = tl.exp(log_m)
        columns, rows = tl.full(r.shape, 1.0, tl.float32), tl.full(r.shape, 1.0, tl.float32)
        for _ in range(SPAN):
            c = tl.sum(m, 1)
            m = m * (1.0 / c)[:, None, :]
            r = tl.sum(m, 2)
            m = m * (1.0 / r)[:, :, None]
            columns *= c
            rows *= r
        log_m = log_m - tl.log(columns)[:, None, :] - tl.log(rows)[:, :, None]
    return tl.exp(log_m)


@triton.jit
def sinkhorn(logits, ITERATIONS: tl.constexpr):
    if ITERATIONS - 1 <= SPAN:
        m = first_pass(columns_of(logits))
        for _ in range(ITERATIONS - 1):
            m = next_pass(m)
    else:
        STRETCHES: tl.constexpr = (ITERATIONS - 2) // SPAN
        m = taken_up(logits, STRETCHES)
        for _ in range(ITERATIONS - 1 - STRETCHES * SPAN):
            m = next_pass(m)
    return m


@triton.jit
def through_passes(grad, m, PASSES: tl.constexpr, LAST: tl.constexpr):
    """dL/dlog of m from that of the matrix PASSES later; LAST: from dL/d of it."""
    PART: tl.constexpr = (PASSES + RESTARTS - 1) // RESTARTS
    starts = (m,)
    for part in tl.static_range(1, RESTARTS):
        # No start lies behind the end, where there are fewer passes than starts.
        for _ in range(tl.maximum(tl.minimum(PART, PASSES - (part - 1) * PART), 0)):
            m = next_pass(m)
        starts = starts + (m,)
    if LAST:
        for _ in range(tl.maximum(PASSES - (RESTARTS - 1) * PART, 0)):
            m = next_pass(m)
        grad = grad * m
    for part in tl.static_range(RESTARTS - 1, -1, -1):
        # The last part may hold fewer passes than the others, or none.
        passes = tl.maximum(tl.minimum(PART, PASSES - part * PART), 0)
        for done in range(passes):
            m = starts[part]
            for _ in range(passes - 1 - done):
                m = next_pass(m)
            a = T_c(m)
            grad = through_pass(grad, a, T_r(a))
    return grad


@triton.jit
def sinkhorn_gradient(grad, logits, ITERATIONS: tl.constexpr):
    """dL/dlogits from dL/dH_res, both ``[BT, n, n]``."""
    PASSES: tl.constexpr = ITERATIONS - 1
    if PASSES <= SPAN:
        grad = through_passes(grad, first_pass(columns_of(logits)), PASSES, True)
    else:
        STRETCHES: tl.constexpr = (PASSES - 1) // SPAN
        m = taken_up(logits, STRETCHES)
        grad = through_passes(grad, m, PASSES - STRETCHES * SPAN, True)
        for done in range(STRETCHES):
            m = taken_up(logits, STRETCHES - 1 - done)
            grad = through_passes(grad, m, SPAN, False)
    half = columns_of(logits)
    return through_pass(grad, tl.exp(2.0 * half), first_pass(half))


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
