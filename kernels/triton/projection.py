"""The projection of all streams of a token with its sum of squares, in one pass (mHC, Eq 14-15).

With MIX the same kernel first computes the streams: F_post,res of one sublayer and the projection
of the next read and write the streams once (the fused edge). Projected are the values as stored, so
that fused and unfused paths agree to the bit.

All n streams of a channel block meet in one matrix product, its inner index ``c * n + stream``. The
channels may be split over programs; each writes its own partial sums, which ``maps_forward``
adds in order.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.defaults import DIVISOR
from megatron_mhc.kernels.reference.dropout import dropout_constants
from megatron_mhc.kernels.triton.device import (
    fold,
    join,
    load_maps,
    load_streams,
    sublayer_output,
    widened,
)
from megatron_mhc.kernels.triton.launch import (
    MOST_REGISTERS,
    Tile,
    cdiv,
    fitted,
    interpreted,
    launch,
    span_of,
)
from megatron_mhc.kernels.triton.maps import MOST_SPLITS, map_columns
from megatron_mhc.kernels.triton.post_res import post_res

# One tile with and without MIX, so that both add in the same order.
TILE = {
    1: Tile(32, 64),
    2: Tile(64, 32, num_warps=8, num_stages=3, registers=128),
    4: Tile(128, 16, num_warps=8, num_stages=3),
    8: Tile(32, 16, num_warps=8),
}
# Streams of more than 8 bits of mantissa go through three-term TF32, which takes twice the
# registers and shared memory.
WIDE_TILE = {
    1: Tile(32, 32),
    2: Tile(32, 32),
    4: Tile(64, 16, num_warps=8),
    8: Tile(16, 16, num_warps=8, num_stages=1),
}
# Of bf16 streams that are read value by value, which takes registers: these spill with ``TILE``.
NARROW_TILE = {**TILE, 1: WIDE_TILE[1], 4: WIDE_TILE[4]}
PACK = Tile(0, 32, num_warps=8)

PRECISIONS = ('bf16x2', 'tf32', 'tf32x3', 'ieee')
"""How phi meets the streams: as bf16 high and low part (24 -> 16 bits; bf16 streams are exact), or
both in fp32 on the matrix unit's TF32, three-term TF32, or plain fp32 arithmetic."""


@triton.jit
def pack_kernel(
    weight_ptr, high_ptr, low_ptr, C,
    N: tl.constexpr, MP: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    c, m = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, MP)
    inside = c < C
    mask = inside[:, None] & (m < M)[None, :]
    for i in tl.static_range(N):
        at = m.to(tl.int64)[None, :] * (N * C) + (i * C + c)[:, None]
        value = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out = (c * N + i)[:, None] * MP + m[None, :]
        if SPLIT:
            high = value.to(tl.bfloat16)
            tl.store(high_ptr + out, high, mask=inside[:, None])
            tl.store(low_ptr + out, value - high.to(tl.float32), mask=inside[:, None])
        else:
            tl.store(high_ptr + out, value, mask=inside[:, None])


@triton.jit
def projection_kernel(
    x_ptr, y_ptr, bias_ptr, seed_ptr, post_ptr, res_ptr, high_ptr, low_ptr,
    out_ptr, partial_ptr, squares_ptr, threshold, scale, T, C, span,
    N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
    MIX: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    split = tl.program_id(1)
    m = tl.arange(0, MP)
    if MIX:
        post, res = load_maps(post_ptr, t, rows, N), load_maps(res_ptr, t, rows, N * N)
    acc = tl.zeros([BT, MP], tl.float32)
    squares = tl.zeros([BT, BC // 8], tl.float32)
    for c0 in range(split * span, min(C, (split + 1) * span), BC):
        c = c0 + tl.arange(0, BC)
        mask = rows[:, None] if EVEN else rows[:, None] & (c < C)[None, :]
        at = t[:, None] * (N * C) + c[None, :]
        x = load_streams(x_ptr, at, C, mask, N)
        if MIX:
            wide = widened(x, N)
            y = sublayer_output(
                y_ptr, bias_ptr, seed_ptr, t, c0, c, C, mask, threshold, scale, HAS_BIAS, DROPOUT
            )
            new = ()
            # x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * y, rounded as it is stored
            for i in tl.static_range(N):
                new = new + (post_res(wide, y, post, res, i, N).to(out_ptr.dtype.element_ty),)
            for i in tl.static_range(N):
                tl.store(out_ptr + at + i * C, new[i], mask=mask)
            x = new
        # Eq 15: sum of squares
        for i in tl.static_range(N):
            value = x[i].to(tl.float32)
            squares += fold(value * value, 8)
        # Eq 14: v phi
        k = c0 * N + tl.arange(0, BC * N)
        phi_at = k[:, None] * MP + m[None, :]
        phi_mask = None if EVEN else (k < C * N)[:, None]
        v = tl.reshape(join(x, 0, 1, N), [BT, BC * N])
        phi = tl.load(high_ptr + phi_at, mask=phi_mask, other=None if EVEN else 0.0)
        if PRECISION == 'bf16x2':
            low = tl.load(low_ptr + phi_at, mask=phi_mask, other=None if EVEN else 0.0)
            if UPCAST:
                acc = tl.dot(v.to(tl.float32), phi.to(tl.float32), acc, input_precision='ieee')
                acc = tl.dot(v.to(tl.float32), low.to(tl.float32), acc, input_precision='ieee')
            else:
                acc = tl.dot(v, phi, acc)
                acc = tl.dot(v, low, acc)
        else:
            acc = tl.dot(v.to(tl.float32), phi, acc, input_precision=PRECISION)
    at = split.to(tl.int64) * T + t
    tl.store(partial_ptr + at[:, None] * MP + m[None, :], acc, mask=rows[:, None])
    tl.store(squares_ptr + at, tl.sum(squares, 1), mask=rows)


def resolved_precision(precision: str, dtype: torch.dtype) -> str:
    """``auto``: the high and low part for bf16 streams, three-term TF32 for wider mantissas."""
    if precision == 'auto':
        return 'bf16x2' if dtype == torch.bfloat16 else 'tf32x3'
    return precision


def pack_weight(
    weight: torch.Tensor, n: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """phi ``[n*n + 2n, n*C]`` fp32 -> ``[C*n, MP]`` in the order of the matrix product.

    Returns:
        The high and the low part in bf16 for ``bf16x2``; else phi in fp32 and None.
    """
    width, columns = weight.shape[1], map_columns(n)
    channels, split = width // n, precision == 'bf16x2'
    dtype = torch.bfloat16 if split else torch.float32
    high = weight.new_empty(width, columns, dtype=dtype)
    low = torch.empty_like(high) if split else None
    launch(
        pack_kernel,
        (cdiv(channels, PACK.channels),),
        *(weight, high, low, channels),
        tile=PACK,
        N=n,
        MP=columns,
        BC=PACK.channels,
        SPLIT=split,
    )
    return high, low


def project(
    x: torch.Tensor, weight: torch.Tensor, n: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams ``[T, n*C]`` -> fp32 partial projections ``[S, T, MP]``, sums of squares ``[S, T]``.

    S is how often the channels were split; the sums over S are v phi and ||v||^2.
    """
    return _project(x, weight, n, precision)


def post_res_project(
    x: torch.Tensor,
    y: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    weight: torch.Tensor,
    precision: str,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fused edge: ``post_res_forward``, and ``project`` of its result, returned last."""
    n = h_post.shape[1]
    mixing = (y, bias, seed, h_post, h_res)
    x_new = torch.empty_like(x)
    partial, squares = _project(x, weight, n, precision, mixing, dropout, x_new)
    return partial, squares, x_new


def _project(
    x: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    precision: str,
    mixing: tuple[torch.Tensor | None, ...] | None = None,
    dropout: float = 0.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = x.shape
    channels, columns = width // n, map_columns(n)
    precision = resolved_precision(precision, x.dtype)
    narrow = NARROW_TILE if channels % DIVISOR else TILE
    tile = fitted((narrow if precision == 'bf16x2' else WIDE_TILE)[n], channels)
    if mixing is None and n == 4 and precision == 'bf16x2':
        # Without a cap the assembler of Triton 3.6 squeezes it to 64 for sm_120, and spills.
        tile = replace(tile, registers=MOST_REGISTERS)
    high, low = pack_weight(weight, n, precision)
    programs = cdiv(tokens, tile.tokens)
    blocks = cdiv(channels, tile.channels)
    span = span_of(programs, blocks, MOST_SPLITS)
    splits = cdiv(blocks, span)
    partial = x.new_empty(splits, tokens, columns, dtype=torch.float32)
    squares = x.new_empty(splits, tokens, dtype=torch.float32)
    y, bias, seed, h_post, h_res = mixing or (None,) * 5
    launch(
        projection_kernel,
        (programs, splits),
        *(x, y, bias, seed, h_post, h_res, high, low, out, partial, squares),
        *(*dropout_constants(dropout), tokens, channels, span * tile.channels),
        tile=tile,
        N=n,
        MP=columns,
        BT=tile.tokens,
        BC=tile.channels,
        EVEN=channels % tile.channels == 0,
        MIX=mixing is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=dropout > 0,
        PRECISION=precision,
        UPCAST=interpreted(),
    )
    return partial, squares
