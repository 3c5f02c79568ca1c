"""From the projected streams to the maps and u, and back (mHC, Eq 3, 15-19).

Forward sums the partial projections in a fixed order, divides by the norm, applies gates and
Sinkhorn. Backward starts from the saved projection and norm, 25 numbers a token for n = 4.

A launch has two kinds of programs. The first few own many tokens each and do Sinkhorn, for which
they wait more than they work; the others own a few tokens and walk over their channels, for u and
for dh_pre. Neither needs a result of the other: H_pre takes no Sinkhorn.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.triton.device import load_maps, load_streams, mix, split, widened
from megatron_mhc.kernels.triton.launch import (
    MOST_REGISTERS,
    SHAPES,
    Tile,
    cdiv,
    fitted,
    launch,
    power_of_two,
    span_of,
)
from megatron_mhc.kernels.triton.pre import pre_gradient
from megatron_mhc.kernels.triton.sinkhorn import matrix_offsets, sinkhorn, sinkhorn_gradient

# Of the programs that walk over channels; all programs of a launch have the same warps.
FORWARD = {1: Tile(4, 256), 2: Tile(4, 256), 4: Tile(4, 256), 8: Tile(2, 512)}
BACKWARD = {
    1: Tile(4, 256, registers=MOST_REGISTERS),
    2: Tile(4, 256),
    4: Tile(4, 256),
    8: Tile(1, 1024),
}
# Tokens of those that do Sinkhorn, n * n values each.
TOKENS = {1: 128, 2: 128, 4: 32, 8: 8}
# Of the loop over partial projections, which would else wait for one after the other.
STAGES = 3
# Parts of the channels of a token at most, where there are few tokens.
MOST_PARTS = 16
# Partial projections at most.
MOST_SPLITS = 8
# A gating factor is a scalar wherever it stands: no code of its own for each alignment.
ALPHAS = ['a_pre_ptr', 'a_post_ptr', 'a_res_ptr']


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
def inverse_norm(squares, width, norm_eps):
    """Eq 15: 1/r, r = ||v|| / sqrt(nC)."""
    inv = 1.0 / tl.sqrt(squares / width + norm_eps)
    # Of squares that overflowed, 1/r = 0 would pass for maps of the biases alone.
    return tl.where(squares == float('inf'), float('nan'), inv)


@triton.jit
def store_maps(
    pid, partial_ptr, squares_ptr, bias_ptr, a_pre_ptr, a_post_ptr, a_res_ptr,
    pre_ptr, post_ptr, res_ptr, proj_ptr, inv_ptr, T, splits, width, norm_eps,
    ITERATIONS: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    STAGES: tl.constexpr, STORE_PRE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    t = pid.to(tl.int64) * BT + tl.arange(0, BT)
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
    inv = inverse_norm(squares, width, norm_eps)
    tl.store(inv_ptr + t, inv, mask=rows)
    tl.store(proj_ptr + map_offsets(t, M, 0, N), pre, mask=tails)
    tl.store(proj_ptr + map_offsets(t, M, N, N), post, mask=tails)
    tl.store(proj_ptr + matrix_offsets(t, M, N) + 2 * N, res, mask=square)
    # Eq 16-18
    i = tl.arange(0, N)
    if STORE_PRE:
        pre = pre * (inv * tl.load(a_pre_ptr))[:, None] + tl.load(bias_ptr + i)[None, :]
        tl.store(pre_ptr + map_offsets(t, N, 0, N), sigmoid(pre), mask=tails)
    post = post * (inv * tl.load(a_post_ptr))[:, None] + tl.load(bias_ptr + N + i)[None, :]
    tl.store(post_ptr + map_offsets(t, N, 0, N), 2.0 * sigmoid(post), mask=tails)
    # Eq 16, 19
    ij = 2 * N + i[:, None] * N + i[None, :]
    res = res * (inv * tl.load(a_res_ptr))[:, None, None] + tl.load(bias_ptr + ij)[None, :, :]
    tl.store(res_ptr + matrix_offsets(t, N * N, N), sinkhorn(res, ITERATIONS), mask=square)


@triton.jit
def store_u(
    pid, x_ptr, partial_ptr, squares_ptr, bias_ptr, a_pre_ptr, u_ptr,
    T, C, splits, span, width, norm_eps,
    N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(C, span)
    t = (pid // parts).to(tl.int64) * BT + tl.arange(0, BT)
    first = (pid % parts) * span
    rows = t < T
    # The sums of ``store_maps``, all loads at once: a split that is not there adds nothing.
    squares, pre = tl.zeros([BT], tl.float32), ()
    for _ in tl.static_range(N):
        pre = pre + (tl.zeros([BT], tl.float32),)
    slice_size = tl.full([], 1, tl.int64) * T
    for s in tl.static_range(MOST_SPLITS):
        # A block: the interpreter makes numbers of a condition that it has to repeat.
        there = rows & (tl.full([BT], s, tl.int32) < splits)
        at = s * slice_size + t
        squares += tl.load(squares_ptr + at, mask=there, other=0.0)
        sums = ()
        for j in tl.static_range(N):
            sums = sums + (pre[j] + tl.load(partial_ptr + at * MP + j, mask=there, other=0.0),)
        pre = sums
    # Eq 16-17
    factor = inverse_norm(squares, width, norm_eps) * tl.load(a_pre_ptr)
    h_pre = ()
    for j in tl.static_range(N):
        h_pre = h_pre + (sigmoid(pre[j] * factor + tl.load(bias_ptr + j)),)
    for c0 in range(first, min(C, first + span), BC):
        c = c0 + tl.arange(0, BC)
        mask = rows[:, None] if EVEN else rows[:, None] & (c < C)[None, :]
        x = load_streams(x_ptr, t[:, None] * (N * C) + c[None, :], C, mask, N)
        # u = sum_j h_pre[j] * x[j]
        u = mix(h_pre, widened(x, N), 0, 1, N)
        tl.store(u_ptr + t[:, None] * C + c[None, :], u, mask=mask)


@triton.jit(do_not_specialize_on_alignment=ALPHAS)
def maps_forward_kernel(
    x_ptr, partial_ptr, squares_ptr, bias_ptr, a_pre_ptr, a_post_ptr, a_res_ptr,
    pre_ptr, post_ptr, res_ptr, proj_ptr, inv_ptr, u_ptr, T, C, splits, span, width, norm_eps,
    ITERATIONS: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, HAS_U: tl.constexpr,
    STAGES: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """BT tokens of a program that makes maps, BW and BC channels a step of one that makes u."""
    pid, of_maps = tl.program_id(0), tl.cdiv(T, BT)
    if pid < of_maps:
        store_maps(
            pid, partial_ptr, squares_ptr, bias_ptr, a_pre_ptr, a_post_ptr, a_res_ptr,
            pre_ptr, post_ptr, res_ptr, proj_ptr, inv_ptr, T, splits, width, norm_eps,
            ITERATIONS, N, MP, BT, STAGES, not HAS_U,
        )  # fmt: skip
    elif HAS_U:
        store_u(
            pid - of_maps, x_ptr, partial_ptr, squares_ptr, bias_ptr, a_pre_ptr, u_ptr,
            T, C, splits, span, width, norm_eps, N, MP, BW, BC, EVEN, MOST_SPLITS,
        )  # fmt: skip


@triton.jit
def store_maps_gradient(
    pid, dpost_ptr, dres_ptr, proj_ptr, inv_ptr, bias_ptr, a_post_ptr, a_res_ptr,
    dproj_ptr, dnorm_ptr, sums_ptr, T, width,
    ITERATIONS: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """All but what h_pre has part in, through 2 sigma and Sinkhorn."""
    M: tl.constexpr = N * N + 2 * N
    t = pid.to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    tails, square = rows[:, None], rows[:, None, None]
    i = tl.arange(0, N)
    ij = 2 * N + i[:, None] * N + i[None, :]
    # The logits again, from the projection (Eq 16)
    inv = tl.load(inv_ptr + t, mask=rows, other=0.0)
    post = tl.load(proj_ptr + map_offsets(t, M, N, N), mask=tails, other=0.0) * inv[:, None]
    res = tl.load(proj_ptr + matrix_offsets(t, M, N) + 2 * N, mask=square, other=0.0)
    res *= inv[:, None, None]
    a_post, a_res = tl.load(a_post_ptr), tl.load(a_res_ptr)
    s_post = sigmoid(post * a_post + tl.load(bias_ptr + N + i)[None, :])
    logits = res * a_res + tl.load(bias_ptr + ij)[None, :, :]
    d_post = tl.load(dpost_ptr + map_offsets(t, N, 0, N), mask=tails, other=0.0)
    d_post = d_post * 2.0 * s_post * (1.0 - s_post)
    d_res = tl.load(dres_ptr + matrix_offsets(t, N * N, N), mask=square, other=0.0)
    d_res = sinkhorn_gradient(d_res, logits, ITERATIONS)
    # db, and dalpha from the normed projection
    m = tl.arange(0, MP)
    tl.store(sums_ptr + m, tl.zeros([MP], tl.float32), mask=m < N)
    tl.store(sums_ptr + N + i, tl.sum(d_post, 0))
    tl.store(sums_ptr + ij, tl.sum(d_res, 0))
    g_post = tl.sum(d_post * post, 1)
    g_res = tl.sum(tl.sum(d_res * res, 2), 1)
    tl.store(sums_ptr + M, 0.0)
    tl.store(sums_ptr + M + 1, tl.sum(g_post))
    tl.store(sums_ptr + M + 2, tl.sum(g_res))
    # dproj = dlogits * alpha / r, padded with zeros to MP columns
    WIDTH: tl.constexpr = 2 * MP if SPLIT else MP
    padding, nothing = tails & (m >= M)[None, :], tl.zeros([BT, MP], tl.float32)
    store_dproj(dproj_ptr, t[:, None] * WIDTH + m[None, :], nothing, padding, MP, SPLIT)
    at_post, at_res = map_offsets(t, WIDTH, N, N), matrix_offsets(t, WIDTH, N) + 2 * N
    store_dproj(dproj_ptr, at_post, d_post * (a_post * inv)[:, None], tails, MP, SPLIT)
    store_dproj(dproj_ptr, at_res, d_res * (a_res * inv)[:, None, None], square, MP, SPLIT)
    # Through r: dx += dnorm * x with dnorm = -(1/r)^2 / (nC) * sum_m dlogit[m] alpha[m] proj[m] / r
    dnorm = -inv * inv / width * (a_post * g_post + a_res * g_res)
    tl.store(dnorm_ptr + t, dnorm, mask=rows)


@triton.jit
def store_pre_gradient(
    pid, du_ptr, x_ptr, dpre_ptr, proj_ptr, inv_ptr, bias_ptr, a_pre_ptr,
    pre_ptr, dproj_ptr, dnorm_ptr, sums_ptr, T, C, width,
    N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
    EVEN: tl.constexpr, HAS_U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What h_pre has part in: its gradient, given or of u, through sigma; and h_pre for u."""
    M: tl.constexpr = N * N + 2 * N
    WIDTH: tl.constexpr = 2 * MP if SPLIT else MP
    t = pid.to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    if HAS_U:
        dpre = pre_gradient(du_ptr, x_ptr, t, rows, C, N, BC, VEC, EVEN)
    else:
        dpre = load_maps(dpre_ptr, t, rows, N)
    inv, a_pre = tl.load(inv_ptr + t, mask=rows, other=0.0), tl.load(a_pre_ptr)
    g_pre = tl.zeros([BT], tl.float32)
    for j in tl.static_range(N):
        pre = tl.load(proj_ptr + t * M + j, mask=rows, other=0.0) * inv
        h_pre = sigmoid(pre * a_pre + tl.load(bias_ptr + j))
        if HAS_U:
            tl.store(pre_ptr + t * N + j, h_pre, mask=rows)
        d_pre = dpre[j] * h_pre * (1.0 - h_pre)
        tl.store(sums_ptr + j, tl.sum(d_pre))
        g_pre += d_pre * pre
        store_dproj(dproj_ptr, t * WIDTH + j, d_pre * (a_pre * inv), rows, MP, SPLIT)
    m = tl.arange(0, MP)
    tl.store(sums_ptr + m, tl.zeros([MP], tl.float32), mask=(m >= N) & (m < M))
    tl.store(sums_ptr + M, tl.sum(g_pre))
    tl.store(sums_ptr + M + 1, 0.0)
    tl.store(sums_ptr + M + 2, 0.0)
    tl.store(dnorm_ptr + t, -inv * inv / width * (a_pre * g_pre), mask=rows)


@triton.jit(do_not_specialize_on_alignment=ALPHAS)
def maps_backward_kernel(
    du_ptr, x_ptr, dpre_ptr, dpost_ptr, dres_ptr, proj_ptr, inv_ptr, bias_ptr,
    a_pre_ptr, a_post_ptr, a_res_ptr, pre_ptr, dproj_ptr, dnorm_ptr, sums_ptr, T, C, width,
    ITERATIONS: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    HAS_U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Each program has a row of ``sums``, dbias and dalpha, which the launcher adds."""
    M: tl.constexpr = N * N + 2 * N
    pid, of_maps = tl.program_id(0), tl.cdiv(T, BT)
    sums_ptr += pid.to(tl.int64) * (M + 3)
    if pid < of_maps:
        store_maps_gradient(
            pid, dpost_ptr, dres_ptr, proj_ptr, inv_ptr, bias_ptr, a_post_ptr, a_res_ptr,
            dproj_ptr, dnorm_ptr, sums_ptr, T, width, ITERATIONS, N, MP, BT, SPLIT,
        )  # fmt: skip
    else:
        dnorm_ptr += T
        store_pre_gradient(
            pid - of_maps, du_ptr, x_ptr, dpre_ptr, proj_ptr, inv_ptr, bias_ptr, a_pre_ptr,
            pre_ptr, dproj_ptr, dnorm_ptr, sums_ptr, T, C, width,
            N, MP, BW, BC, VEC, EVEN, HAS_U, SPLIT,
        )  # fmt: skip


def maps_forward(
    partial: torch.Tensor,
    squares: torch.Tensor,
    bias: torch.Tensor,
    alphas: Sequence[torch.Tensor],
    x: torch.Tensor,
    n: int,
    iterations: int,
    norm_eps: float,
    lead: Sequence[int],
    with_u: bool,
) -> tuple[torch.Tensor, ...]:
    """Partial projections ``[S, T, MP]`` and sums of squares ``[S, T]`` of x ``[T, n*C]`` -> maps.

    ``alphas`` are those of pre, post and res, one number each; ``lead`` the dimensions of tokens.

    Returns:
        u ``[..., C]`` in the dtype of x where ``with_u``, else h_pre ``[..., n]``; h_post
        ``[..., n]``, h_res ``[..., n, n]``, and for backward the projection ``[T, n*n + 2n]`` and
        1/r ``[T]``, all fp32.
    """
    splits, tokens, columns = partial.shape
    width = x.shape[1]
    tile, grid, span, constants = _forward_plan(tokens, width // n, n, with_u)
    post, res = partial.new_empty(*lead, n), partial.new_empty(*lead, n, n)
    proj, inv = partial.new_empty(tokens, n * n + 2 * n), partial.new_empty(tokens)
    if with_u:
        first = x.new_empty(*lead, width // n)
        pre, u = None, first
    else:
        first = partial.new_empty(*lead, n)
        pre, u = first, None
    launch(
        maps_forward_kernel,
        grid,
        *(x if with_u else None, partial, squares, bias, *alphas, pre, post, res, proj, inv, u),
        *(tokens, width // n, splits, span, float(width), norm_eps),
        tile=tile,
        ITERATIONS=iterations,
        MP=columns,
        **constants,
    )
    return first, post, res, proj, inv


@functools.lru_cache(SHAPES)
def _forward_plan(
    tokens: int, channels: int, n: int, with_u: bool
) -> tuple[Tile, tuple[int], int, dict[str, Any]]:
    """Tile, grid, channels of a program and constants, for T tokens of width C."""
    tile = fitted(FORWARD[n], channels)
    programs, span = cdiv(tokens, TOKENS[n]), channels
    if with_u:
        of_tokens, blocks = cdiv(tokens, tile.tokens), cdiv(channels, tile.channels)
        span = span_of(of_tokens, blocks, MOST_PARTS) * tile.channels
        programs += of_tokens * cdiv(channels, span)
    own = {'HAS_U': with_u, 'STAGES': STAGES, 'MOST_SPLITS': MOST_SPLITS}
    return tile, (programs,), span, _constants(n, tile, channels) | own


def maps_backward(
    dpre: torch.Tensor | None,
    dpost: torch.Tensor,
    dres: torch.Tensor,
    proj: torch.Tensor,
    inv: torch.Tensor,
    bias: torch.Tensor,
    alphas: Sequence[torch.Tensor],
    x: torch.Tensor,
    iterations: int,
    precision: str,
    du: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the maps -> those of the projection, the norm, b and alpha.

    ``du`` ``[T, C]``, the gradient of u, may take the place of ``dpre``. ``precision`` is that of
    the products in ``read_backward``, which take dproj.

    Returns:
        h_pre ``[T, n]`` again where ``du`` is given, else None; dproj ``[T, MP]``; two addends of
        dnorm ``[2, T]`` (dx += dnorm * x); dbias and dalpha in one ``[n*n + 2n + 3]``. All fp32,
        but dproj of ``bf16x2`` is ``[T, 2 MP]`` in bf16, the high parts before the low ones.
    """
    tokens, n = dpost.shape
    width, parts = x.shape[1], precision == 'bf16x2'
    tile, grid, columns, constants = _backward_plan(tokens, width // n, n)
    pre = None if du is None else torch.empty_like(dpost)
    if parts:
        dproj = proj.new_empty(tokens, 2 * columns, dtype=torch.bfloat16)
    else:
        dproj = proj.new_empty(tokens, columns)
    dnorm, sums = proj.new_empty(2, tokens), proj.new_empty(grid[0], proj.shape[1] + 3)
    launch(
        maps_backward_kernel,
        grid,
        *(du, None if du is None else x, dpre, dpost, dres, proj, inv, bias, *alphas),
        *(pre, dproj, dnorm, sums, tokens, width // n, float(width)),
        tile=tile,
        ITERATIONS=iterations,
        HAS_U=du is not None,
        SPLIT=parts,
        **constants,
    )
    return pre, dproj, dnorm, sums.sum(0)


@functools.lru_cache(SHAPES)
def _backward_plan(
    tokens: int, channels: int, n: int
) -> tuple[Tile, tuple[int], int, dict[str, Any]]:
    """Tile, grid, columns of dproj and constants, for T tokens of width C."""
    tile, columns = fitted(BACKWARD[n], channels), map_columns(n)
    programs = cdiv(tokens, TOKENS[n]) + cdiv(tokens, tile.tokens)
    own = {'MP': columns, 'VEC': 8}
    return tile, (programs,), columns, _constants(n, tile, channels) | own


def _constants(n: int, tile: Tile, channels: int) -> dict[str, Any]:
    """Those of both directions."""
    even = channels % tile.channels == 0
    return {'N': n, 'BT': TOKENS[n], 'BW': tile.tokens, 'BC': tile.channels, 'EVEN': even}
