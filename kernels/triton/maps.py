"""From the projected streams to the maps, and back (mHC, Eq 15-19). Touches no stream.

Forward sums the partial projections in a fixed order, divides by the norm, applies gates and
Sinkhorn. Backward starts from the saved projection and norm, 25 numbers a token for n = 4.
"""

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.triton.device import split
from megatron_mhc.kernels.triton.launch import MOST_REGISTERS, Tile, cdiv, launch, power_of_two
from megatron_mhc.kernels.triton.sinkhorn import matrix_offsets, sinkhorn, sinkhorn_gradient

FORWARD = {1: Tile(128), 2: Tile(128), 4: Tile(64, num_warps=2), 8: Tile(16)}
BACKWARD = {1: Tile(128), 2: Tile(128, registers=MOST_REGISTERS), 4: Tile(32), 8: Tile(8)}
# Of the loop over partial projections: those of four streams have most splits.
STAGES = {1: 1, 2: 1, 4: 3, 8: 1}


def map_columns(n: int) -> int:
    """Columns of a projection tile: n*n + 2n, up to a power of two a matrix unit takes."""
    return max(16, power_of_two(n * n + 2 * n))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def map_offsets(t, STRIDE: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    return t[:, None] * STRIDE + FIRST + tl.arange(0, N)[None, :]


@triton.jit
def store_dproj(ptr, at, value, mask, MP: tl.constexpr, SPLIT: tl.constexpr):
    """The value, or its two parts in bf16, MP columns apart."""
    if SPLIT:
        high, low = split(value, 'bf16x2')
        tl.store(ptr + at, high, mask=mask)
        tl.store(ptr + at + MP, low, mask=mask)
    else:
        tl.store(ptr + at, value, mask=mask)


@triton.jit
def maps_forward_kernel(
    partial_ptr, squares_ptr, bias_ptr, alpha_ptr, pre_ptr, post_ptr, res_ptr, proj_ptr, inv_ptr,
    T, splits, width, norm_eps,
    ITERATIONS: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    tails, square = rows[:, None], rows[:, None, None]
    at_pre, at_post = map_offsets(t, MP, 0, N), map_offsets(t, MP, N, N)
    at_res = matrix_offsets(t, MP, N) + 2 * N
    squares = tl.zeros([BT], tl.float32)
    pre, post = tl.zeros([BT, N], tl.float32), tl.zeros([BT, N], tl.float32)
    res = tl.zeros([BT, N, N], tl.float32)
    # Not T.to(int64): for T = 1 the compiler sees a plain number.
    slice_size = tl.full([], MP, tl.int64) * T
    for _ in tl.range(0, splits, num_stages=STAGES):
        squares += tl.load(squares_ptr + t, mask=rows, other=0.0)
        pre += tl.load(partial_ptr + at_pre, mask=tails, other=0.0)
        post += tl.load(partial_ptr + at_post, mask=tails, other=0.0)
        res += tl.load(partial_ptr + at_res, mask=square, other=0.0)
        squares_ptr += T
        partial_ptr += slice_size
    # Eq 15: 1/r, r = ||v|| / sqrt(nC)
    inv = 1.0 / tl.sqrt(squares / width + norm_eps)
    # Of squares that overflowed, 1/r = 0 would pass for maps of the biases alone.
    inv = tl.where(squares == float('inf'), float('nan'), inv)
    tl.store(inv_ptr + t, inv, mask=rows)
    tl.store(proj_ptr + map_offsets(t, M, 0, N), pre, mask=tails)
    tl.store(proj_ptr + map_offsets(t, M, N, N), post, mask=tails)
    tl.store(proj_ptr + matrix_offsets(t, M, N) + 2 * N, res, mask=square)
    # Eq 16-18
    i = tl.arange(0, N)
    pre = pre * (inv * tl.load(alpha_ptr))[:, None] + tl.load(bias_ptr + i)[None, :]
    post = post * (inv * tl.load(alpha_ptr + 1))[:, None] + tl.load(bias_ptr + N + i)[None, :]
    tl.store(pre_ptr + map_offsets(t, N, 0, N), sigmoid(pre), mask=tails)
    tl.store(post_ptr + map_offsets(t, N, 0, N), 2.0 * sigmoid(post), mask=tails)
    # Eq 16, 19
    ij = 2 * N + i[:, None] * N + i[None, :]
    res = res * (inv * tl.load(alpha_ptr + 2))[:, None, None] + tl.load(bias_ptr + ij)[None, :, :]
    tl.store(res_ptr + matrix_offsets(t, N * N, N), sinkhorn(res, ITERATIONS), mask=square)


@triton.jit
def maps_backward_kernel(
    dpre_ptr, dpost_ptr, dres_ptr, proj_ptr, inv_ptr, bias_ptr, alpha_ptr,
    pre_ptr, dproj_ptr, dnorm_ptr, dbias_ptr, dalpha_ptr, T, width,
    ITERATIONS: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    pid = tl.program_id(0)
    t = pid.to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    tails, square = rows[:, None], rows[:, None, None]
    i = tl.arange(0, N)
    ij = 2 * N + i[:, None] * N + i[None, :]
    # The logits again, from the projection (Eq 16)
    inv = tl.load(inv_ptr + t, mask=rows, other=0.0)
    pre = tl.load(proj_ptr + map_offsets(t, M, 0, N), mask=tails, other=0.0) * inv[:, None]
    post = tl.load(proj_ptr + map_offsets(t, M, N, N), mask=tails, other=0.0) * inv[:, None]
    res = tl.load(proj_ptr + matrix_offsets(t, M, N) + 2 * N, mask=square, other=0.0)
    res *= inv[:, None, None]
    a_pre, a_post, a_res = tl.load(alpha_ptr), tl.load(alpha_ptr + 1), tl.load(alpha_ptr + 2)
    h_pre = sigmoid(pre * a_pre + tl.load(bias_ptr + i)[None, :])
    tl.store(pre_ptr + map_offsets(t, N, 0, N), h_pre, mask=tails)
    s_post = sigmoid(post * a_post + tl.load(bias_ptr + N + i)[None, :])
    logits = res * a_res + tl.load(bias_ptr + ij)[None, :, :]
    # dlogits through sigma, 2 sigma and Sinkhorn
    at = map_offsets(t, N, 0, N)
    d_pre = tl.load(dpre_ptr + at, mask=tails, other=0.0) * h_pre * (1.0 - h_pre)
    d_post = tl.load(dpost_ptr + at, mask=tails, other=0.0) * 2.0 * s_post * (1.0 - s_post)
    d_res = tl.load(dres_ptr + matrix_offsets(t, N * N, N), mask=square, other=0.0)
    d_res = sinkhorn_gradient(d_res, logits, ITERATIONS)
    # db, and dalpha from the normed projection; summed over programs by the launcher
    dbias_ptr += pid * M
    tl.store(dbias_ptr + i, tl.sum(d_pre, 0))
    tl.store(dbias_ptr + N + i, tl.sum(d_post, 0))
    tl.store(dbias_ptr + ij, tl.sum(d_res, 0))
    g_pre = tl.sum(d_pre * pre, 1)
    g_post = tl.sum(d_post * post, 1)
    g_res = tl.sum(tl.sum(d_res * res, 2), 1)
    dalpha_ptr += pid * 3
    tl.store(dalpha_ptr, tl.sum(g_pre))
    tl.store(dalpha_ptr + 1, tl.sum(g_post))
    tl.store(dalpha_ptr + 2, tl.sum(g_res))
    # dproj = dlogits * alpha / r, padded with zeros to MP columns
    WIDTH: tl.constexpr = 2 * MP if SPLIT else MP
    m = tl.arange(0, MP)
    padding, nothing = tails & (m >= M)[None, :], tl.zeros([BT, MP], tl.float32)
    store_dproj(dproj_ptr, t[:, None] * WIDTH + m[None, :], nothing, padding, MP, SPLIT)
    at_pre, at_post = map_offsets(t, WIDTH, 0, N), map_offsets(t, WIDTH, N, N)
    store_dproj(dproj_ptr, at_pre, d_pre * (a_pre * inv)[:, None], tails, MP, SPLIT)
    store_dproj(dproj_ptr, at_post, d_post * (a_post * inv)[:, None], tails, MP, SPLIT)
    at_res = matrix_offsets(t, WIDTH, N) + 2 * N
    store_dproj(dproj_ptr, at_res, d_res * (a_res * inv)[:, None, None], square, MP, SPLIT)
    # Through r: dx += dnorm * x with dnorm = -(1/r)^2 / (nC) * sum_m dlogit[m] alpha[m] proj[m] / r
    dnorm = -inv * inv / width * (a_pre * g_pre + a_post * g_post + a_res * g_res)
    tl.store(dnorm_ptr + t, dnorm, mask=rows)


def maps_forward(
    partial: torch.Tensor,
    squares: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    n: int,
    width: int,
    iterations: int,
    norm_eps: float,
) -> tuple[torch.Tensor, ...]:
    """Partial projections ``[S, T, MP]`` and sums of squares ``[S, T]`` of width n*C -> maps.

    Returns:
        fp32 h_pre ``[T, n]``, h_post ``[T, n]``, h_res ``[T, n, n]``, and for backward the
        projection ``[T, n*n + 2n]`` and 1/r ``[T]``.
    """
    splits, tokens, columns = partial.shape
    tile = FORWARD[n]
    pre, post = partial.new_empty(tokens, n), partial.new_empty(tokens, n)
    res = partial.new_empty(tokens, n, n)
    proj, inv = partial.new_empty(tokens, n * n + 2 * n), partial.new_empty(tokens)
    launch(
        maps_forward_kernel,
        (cdiv(tokens, tile.tokens),),
        *(partial, squares, bias, alpha, pre, post, res, proj, inv),
        *(tokens, splits, float(width), norm_eps),
        tile=tile,
        ITERATIONS=iterations,
        N=n,
        MP=columns,
        BT=tile.tokens,
        STAGES=STAGES[n],
    )
    return pre, post, res, proj, inv


def maps_backward(
    dpre: torch.Tensor,
    dpost: torch.Tensor,
    dres: torch.Tensor,
    proj: torch.Tensor,
    inv: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    width: int,
    iterations: int,
    precision: str,
) -> tuple[torch.Tensor, ...]:
    """Gradients of the maps -> those of the projection, the norm, b and alpha.

    ``precision`` is that of the products in ``read_backward``, which take dproj.

    Returns:
        h_pre ``[T, n]`` again, dproj ``[T, MP]``, dnorm ``[T]`` (dx += dnorm * x), dbias
        ``[n*n + 2n]``, dalpha ``[3]``, all fp32; but dproj of ``bf16x2`` is ``[T, 2 MP]`` in bf16,
        the high parts before the low ones.
    """
    tokens, n = dpre.shape
    tile, columns = BACKWARD[n], map_columns(n)
    programs = cdiv(tokens, tile.tokens)
    pre, dnorm = torch.empty_like(dpre), torch.empty_like(inv)
    parts = precision == 'bf16x2'
    if parts:
        dproj = proj.new_empty(tokens, 2 * columns, dtype=torch.bfloat16)
    else:
        dproj = proj.new_empty(tokens, columns)
    dbias, dalpha = proj.new_empty(programs, proj.shape[1]), proj.new_empty(programs, 3)
    launch(
        maps_backward_kernel,
        (programs,),
        *(dpre, dpost, dres, proj, inv, bias, alpha),
        *(pre, dproj, dnorm, dbias, dalpha, tokens, float(width)),
        tile=tile,
        ITERATIONS=iterations,
        N=n,
        MP=columns,
        BT=tile.tokens,
        SPLIT=parts,
    )
    return pre, dproj, dnorm, dbias.sum(0), dalpha.sum(0)
