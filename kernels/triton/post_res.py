"""F_post,res, ``x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * dropout(y + bias)`` (mHC, Eq 3).

Backward reads the gradient g of x' and the streams once: a program owns whole rows, so that the
sums over channels need neither atomics nor a second kernel.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.reference.dropout import dropout_constants
from megatron_mhc.kernels.triton.device import (
    dropout_scale,
    fold,
    load_maps,
    load_streams,
    mix,
    sublayer_output,
    widened,
)
from megatron_mhc.kernels.triton.launch import Tile, cdiv, fitted, launch

FORWARD = {1: Tile(4, 256), 2: Tile(4, 256), 4: Tile(4, 256), 8: Tile(2, 256, num_warps=2)}
BACKWARD = {1: Tile(4, 256), 2: Tile(4, 256), 4: Tile(4, 256), 8: Tile(1, 512)}
# Backward copies the next block of four streams ahead; left alone, newer Tritons put loads behind
# uses of earlier ones. Fewer streams need no such help, and eight were not compiled with it.
# Channels that fill no tile do without: masks take the registers, and in fp32 they would spill.
STAGES = {1: 1, 2: 1, 4: 2, 8: 1}


@triton.jit
def post_res(x, y, post, res, i: tl.constexpr, N: tl.constexpr):
    """New stream i in fp32; the one place where its order of operations is written."""
    return tl.fma(post[i][:, None], y, mix(res, x, i * N, 1, N))


@triton.jit
def post_res_forward_kernel(
    x_ptr, y_ptr, bias_ptr, seed_ptr, post_ptr, res_ptr, out_ptr, threshold, scale, T, C,
    N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0).to(tl.int64)
    t = pid // blocks * BT + tl.arange(0, BT)
    c0 = (pid % blocks).to(tl.int32) * BC
    c = c0 + tl.arange(0, BC)
    rows = t < T
    mask = rows[:, None] if EVEN else rows[:, None] & (c < C)[None, :]
    post, res = load_maps(post_ptr, t, rows, N), load_maps(res_ptr, t, rows, N * N)
    at = t[:, None] * (N * C) + c[None, :]
    x = widened(load_streams(x_ptr, at, C, mask, N), N)
    y = sublayer_output(
        y_ptr, bias_ptr, seed_ptr, t, c0, c, C, mask, threshold, scale, HAS_BIAS, DROPOUT
    )
    # x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * y
    for i in tl.static_range(N):
        tl.store(out_ptr + at + i * C, post_res(x, y, post, res, i, N), mask=mask)


@triton.jit
def post_res_backward_kernel(
    g_ptr, x_ptr, y_ptr, bias_ptr, seed_ptr, post_ptr, res_ptr,
    dx_ptr, dy_ptr, dpost_ptr, dres_ptr, threshold, scale, T, C,
    N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, WRITE_DX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    post = load_maps(post_ptr, t, rows, N)
    if WRITE_DX:
        res = load_maps(res_ptr, t, rows, N * N)
    dpost, dres = (), ()
    for _ in tl.static_range(N):
        dpost = dpost + (tl.zeros([BT, BC // VEC], tl.float32),)
    for _ in tl.static_range(N * N):
        dres = dres + (tl.zeros([BT, BC // VEC], tl.float32),)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        c = c0 + tl.arange(0, BC)
        mask = rows[:, None] if EVEN else rows[:, None] & (c < C)[None, :]
        at = t[:, None] * (N * C) + c[None, :]
        g = widened(load_streams(g_ptr, at, C, mask, N), N)
        x = widened(load_streams(x_ptr, at, C, mask, N), N)
        y = sublayer_output(
            y_ptr, bias_ptr, seed_ptr, t, c0, c, C, mask, threshold, scale, HAS_BIAS, DROPOUT
        )
        # dh_post[i] = sum_c g[i] * y and dh_res[i, j] = sum_c g[i] * x[j]
        post_sums, res_sums = (), ()
        for i in tl.static_range(N):
            post_sums = post_sums + (dpost[i] + fold(g[i] * y, VEC),)
            for j in tl.static_range(N):
                res_sums = res_sums + (dres[i * N + j] + fold(g[i] * x[j], VEC),)
        dpost, dres = post_sums, res_sums
        # dy = sum_i h_post[i] * g[i], through the same dropout
        dy = mix(post, g, 0, 1, N)
        if DROPOUT:
            dy *= dropout_scale(seed_ptr, t, c0, C, threshold, scale, BC)
        tl.store(dy_ptr + t[:, None] * C + c[None, :], dy, mask=mask)
        if WRITE_DX:
            # dx[j] = sum_i h_res[i, j] * g[i]
            for j in tl.static_range(N):
                tl.store(dx_ptr + at + j * C, mix(res, g, j, N, N), mask=mask)
    for i in tl.static_range(N):
        tl.store(dpost_ptr + t * N + i, tl.sum(dpost[i], 1), mask=rows)
    for i in tl.static_range(N * N):
        tl.store(dres_ptr + t * (N * N) + i, tl.sum(dres[i], 1), mask=rows)


def post_res_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x ``[T, n*C]``, y ``[T, C]``, fp32 maps -> ``[T, n*C]`` in the dtype of x.

    ``bias`` is ``[C]``; ``seed`` is ``[1]`` int64, needed where ``dropout`` > 0.
    """
    tokens, n = h_post.shape
    channels = y.shape[1]
    tile = fitted(FORWARD[n], channels)
    out = torch.empty_like(x)
    launch(
        post_res_forward_kernel,
        (cdiv(tokens, tile.tokens) * cdiv(channels, tile.channels),),
        *(x, y, bias, seed, h_post, h_res, out, *dropout_constants(dropout), tokens, channels),
        tile=tile,
        N=n,
        BT=tile.tokens,
        BC=tile.channels,
        EVEN=channels % tile.channels == 0,
        HAS_BIAS=bias is not None,
        DROPOUT=dropout > 0,
    )
    return out


def post_res_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """g ``[T, n*C]`` -> dy ``[T, C]``, fp32 dh_post, dh_res, and dx unless ``h_res`` is None."""
    tokens, n = h_post.shape
    channels = y.shape[1]
    tile = fitted(BACKWARD[n], channels)
    even = channels % tile.channels == 0
    if n == 2 and h_res is not None and dropout > 0 and even:
        # Without a cap the assembler of Triton 3.9 squeezes it further for sm_120, and spills.
        tile = replace(tile, registers=80)
    dx = None if h_res is None else torch.empty_like(x)
    dy = torch.empty_like(y)
    dpost = torch.empty_like(h_post)
    dres = h_post.new_empty(tokens, n, n)
    launch(
        post_res_backward_kernel,
        (cdiv(tokens, tile.tokens),),
        *(g, x, y, bias, seed, h_post, h_res, dx, dy, dpost, dres),
        *(*dropout_constants(dropout), tokens, channels),
        tile=tile,
        N=n,
        BT=tile.tokens,
        BC=tile.channels,
        VEC=8,
        EVEN=even,
        HAS_BIAS=bias is not None,
        DROPOUT=dropout > 0,
        WRITE_DX=dx is not None,
        STAGES=STAGES[n] if even else 1,
    )
    return dy, dpost, dres, dx
