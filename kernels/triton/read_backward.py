"""Gradient of the streams, all uses together, and of phi: dX is written once (mHC, Eq 3, 14-16).

    dx[j] = sum_i h_res[i, j] g[i] + h_pre[j] du + sum_m dproj[m] phi[m, j] + dnorm x[j]

A program owns a slab of channels in all streams, keeps its part of phi, and walks over a segment of
the tokens, so that dphi stays in registers; segments are summed in order. The mixed gradient
``sum_i h_res[i, j] g[i]`` is computed here rather than stored by ``post_res_backward``: reading g
again costs half of writing and reading a partial dx.
"""

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.triton.device import load_maps, load_streams, mix, split
from megatron_mhc.kernels.triton.launch import Tile, cdiv, fitted, interpreted, launch, span_of
from megatron_mhc.kernels.triton.maps import map_columns
from megatron_mhc.kernels.triton.projection import resolved_precision

# Few tokens a step: in the layout of the matrix product a thread holds rows of several of them.
TILE = {
    1: Tile(16, 128, num_warps=8, num_stages=3),
    2: Tile(16, 64, num_stages=3, registers=168),
    4: Tile(16, 64, num_stages=3),
    8: Tile(16, 16, num_warps=8),
}
# Of channels that fill no tile, whose masks take registers.
NARROW_TILE = {**TILE, 4: Tile(16, 64, num_warps=8, num_stages=3)}
# Operands in fp32 take twice the room; these fit the 99 KiB of the smallest GPUs, but for n = 8.
WIDE_TILE = {
    1: Tile(16, 64),
    2: Tile(16, 64, num_warps=8),
    4: Tile(16, 64, num_warps=8, num_stages=1),
    8: Tile(16, 16, num_warps=8, num_stages=1),
}
MOST_SEGMENTS = 16


@triton.jit
def product(
    a_high, a_low, b_high, b_low, acc,
    PRECISION: tl.constexpr, EXACT_B: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + a b of split operands; the product of the low parts, 2^-16 of it, is left out."""
    if PRECISION != 'bf16x2':
        acc = tl.dot(a_high, b_high, acc, input_precision=PRECISION)
    elif UPCAST:
        a, b = a_high.to(tl.float32) + a_low.to(tl.float32), b_high.to(tl.float32)
        if not EXACT_B:
            b += b_low.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision='ieee')
    else:
        acc = tl.dot(a_high, b_high, acc)
        acc = tl.dot(a_low, b_high, acc)
        if not EXACT_B:
            acc = tl.dot(a_high, b_low, acc)
    return acc


@triton.jit
def load_dproj(ptr, t, rows, MP: tl.constexpr, PRECISION: tl.constexpr):
    """High and low part of dproj ``[BT, MP]``, and both transposed.

    In bf16 each is read twice and copied ahead to where its product wants it: turned here, it would
    keep all warps waiting for memory and for each other.
    """
    m = tl.arange(0, MP)
    if PRECISION == 'bf16x2':
        at, at_t = t[:, None] * (2 * MP) + m[None, :], m[:, None] + t[None, :] * (2 * MP)
        high = tl.load(ptr + at, mask=rows[:, None], other=0.0)
        low = tl.load(ptr + at + MP, mask=rows[:, None], other=0.0)
        high_t = tl.load(ptr + at_t, mask=rows[None, :], other=0.0)
        low_t = tl.load(ptr + at_t + MP, mask=rows[None, :], other=0.0)
        return high, low, high_t, low_t
    else:
        value = tl.load(ptr + t[:, None] * MP + m[None, :], mask=rows[:, None], other=0.0)
        return value, value, tl.trans(value), tl.trans(value)


@triton.jit
def read_backward_kernel(
    x_ptr, g_ptr, du_ptr, pre_ptr, res_ptr, dproj_ptr, dnorm_ptr, weight_ptr,
    dx_ptr, dweight_ptr, T, C, span,
    N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
    HAS_G: tl.constexpr, HAS_U: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    segment = tl.program_id(1)
    m = tl.arange(0, MP)
    inside = c < C
    phi_at = m.to(tl.int64)[:, None] * (N * C) + c[None, :]
    phi_mask = (m < M)[:, None] & inside[None, :]
    phi_high, phi_low, dphi = (), (), ()
    for j in tl.static_range(N):
        phi = tl.load(weight_ptr + phi_at + j * C, mask=phi_mask, other=0.0).to(tl.float32)
        high, low = split(phi, PRECISION)
        phi_high, phi_low = phi_high + (high,), phi_low + (low,)
        dphi = dphi + (tl.zeros([MP, BC], tl.float32),)
    for t0 in tl.range(segment * span, min(T, (segment + 1) * span), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        rows = t < T
        mask = rows[:, None] if EVEN else rows[:, None] & inside[None, :]
        at = t[:, None] * (N * C) + c[None, :]
        x = load_streams(x_ptr, at, C, mask, N)
        d_high, d_low, d_high_t, d_low_t = load_dproj(dproj_ptr, t, rows, MP, PRECISION)
        dnorm = tl.load(dnorm_ptr + t, mask=rows, other=0.0)
        dnorm = (dnorm + tl.load(dnorm_ptr + T + t, mask=rows, other=0.0))[:, None]
        if HAS_U:
            pre = load_maps(pre_ptr, t, rows, N)
            du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_G:
            res = load_maps(res_ptr, t, rows, N * N)
            g = load_streams(g_ptr, at, C, mask, N)
        sums = ()
        for j in tl.static_range(N):
            # dx[j]; the matrix product comes last, so that all before it stays in the layout in
            # which streams are loaded and a thread needs the maps of one token only
            dx = dnorm * x[j].to(tl.float32)
            if HAS_U:
                dx = tl.fma(pre[j][:, None], du, dx)
            if HAS_G:
                dx += mix(res, g, j, N, N)
            dx = product(d_high, d_low, phi_high[j], phi_low[j], dx, PRECISION, False, UPCAST)
            tl.store(dx_ptr + at + j * C, dx, mask=mask)
            # dphi[m, j] = sum_t dproj[t, m] x[t, j]
            v = x[j] if PRECISION == 'bf16x2' else x[j].to(tl.float32)
            acc = product(d_high_t, d_low_t, v, v, dphi[j], PRECISION, True, UPCAST)
            sums = sums + (acc,)
        dphi = sums
    dweight_ptr += segment.to(tl.int64) * M * N * C
    for j in tl.static_range(N):
        tl.store(dweight_ptr + phi_at + j * C, dphi[j], mask=phi_mask)


def backward_precision(precision: str, dtype: torch.dtype, n: int) -> str:
    """That of both products here, for which ``maps_backward`` stores its gradient."""
    precision = resolved_precision(precision, dtype)
    # 80 columns a stream: both parts of phi and its gradient do not fit the registers.
    return 'tf32' if n == 8 and precision == 'bf16x2' else precision


def read_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    dproj: torch.Tensor,
    dnorm: torch.Tensor,
    precision: str,
    g: torch.Tensor | None = None,
    h_res: torch.Tensor | None = None,
    du: torch.Tensor | None = None,
    h_pre: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``maps_backward`` left, with the gradients of the streams' other uses -> dx and dphi.

    Args:
        x: ``[T, n*C]``; weight: fp32 ``[n*n + 2n, n*C]``; dproj: as ``maps_backward`` stored it for
            ``backward_precision``; dnorm: ``[2, T]``, added; precision: what that gave.
        g: ``[T, n*C]``, gradient of the streams that F_post,res made with ``h_res``, or None.
        du: ``[T, C]``, gradient of the sublayer input that F_pre made with ``h_pre``, or None.

    Returns:
        dx ``[T, n*C]`` in the dtype of x and fp32 dphi ``[n*n + 2n, n*C]``.
    """
    tokens, width = x.shape
    n = next(n for n in TILE if n * n + 2 * n == weight.shape[0])
    channels = width // n
    narrow = precision == 'bf16x2' or (n == 8 and x.dtype == torch.bfloat16)
    tile = fitted((TILE if narrow else WIDE_TILE)[n], channels)
    if precision == 'bf16x2' and channels % tile.channels:
        tile = fitted(NARROW_TILE[n], channels)
    slabs, blocks = cdiv(channels, tile.channels), cdiv(tokens, tile.tokens)
    span = span_of(slabs, blocks, MOST_SEGMENTS)
    segments = cdiv(blocks, span)
    dx, dweight = torch.empty_like(x), weight.new_empty(segments, *weight.shape)
    launch(
        read_backward_kernel,
        (slabs, segments),
        *(x, g, du, h_pre, h_res, dproj, dnorm, weight, dx, dweight),
        *(tokens, channels, span * tile.tokens),
        tile=tile,
        N=n,
        MP=map_columns(n),
        BT=tile.tokens,
        BC=tile.channels,
        EVEN=channels % tile.channels == 0,
        HAS_G=g is not None,
        HAS_U=du is not None,
        PRECISION=precision,
        UPCAST=interpreted(),
        STAGES=tile.num_stages,
    )
    return dx, dweight[0] if segments == 1 else dweight.sum(0)
