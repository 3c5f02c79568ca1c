"""F_pre, ``u = sum_j h_pre[j] * x[j]``, and its gradient (mHC, Eq 3)."""

import torch
import triton
import triton.language as tl

from megatron_mhc.kernels.triton.device import fold, load_maps, load_streams, mix, widened
from megatron_mhc.kernels.triton.launch import Tile, cdiv, fitted, launch

FORWARD = {1: Tile(4, 256), 2: Tile(4, 256), 4: Tile(4, 256), 8: Tile(2, 256, num_warps=2)}
BACKWARD = {1: Tile(4, 256), 2: Tile(4, 256), 4: Tile(4, 256), 8: Tile(1, 512, num_warps=2)}


@triton.jit
def pre_forward_kernel(
    x_ptr, pre_ptr, u_ptr, T, C,
    N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0).to(tl.int64)
    t = pid // blocks * BT + tl.arange(0, BT)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    rows = t < T
    mask = rows[:, None] if EVEN else rows[:, None] & (c < C)[None, :]
    pre = load_maps(pre_ptr, t, rows, N)
    x = load_streams(x_ptr, t[:, None] * (N * C) + c[None, :], C, mask, N)
    # u = sum_j h_pre[j] * x[j]
    tl.store(u_ptr + t[:, None] * C + c[None, :], mix(pre, widened(x, N), 0, 1, N), mask=mask)


@triton.jit
def pre_gradient(
    du_ptr, x_ptr, t, rows, C,
    N: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    pre=None, dx_ptr=None,
):  # fmt: skip
    """dh_pre of whole rows as N vectors ``[BT]``; stores dx where there is a place for it."""
    BT: tl.constexpr = t.shape[0]
    dpre = ()
    for _ in tl.static_range(N):
        dpre = dpre + (tl.zeros([BT, BC // VEC], tl.float32),)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        mask = rows[:, None] if EVEN else rows[:, None] & (c < C)[None, :]
        at = t[:, None] * (N * C) + c[None, :]
        x = widened(load_streams(x_ptr, at, C, mask, N), N)
        du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        # dh_pre[j] = sum_c du * x[j]
        sums = ()
        for j in tl.static_range(N):
            sums = sums + (dpre[j] + fold(du * x[j], VEC),)
        dpre = sums
        if dx_ptr is not None:
            # dx[j] = h_pre[j] * du
            for j in tl.static_range(N):
                tl.store(dx_ptr + at + j * C, pre[j][:, None] * du, mask=mask)
    total = ()
    for j in tl.static_range(N):
        total = total + (tl.sum(dpre[j], 1),)
    return total


@triton.jit
def pre_backward_kernel(
    du_ptr, x_ptr, pre_ptr, dpre_ptr, dx_ptr, T, C,
    N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rows = t < T
    pre = load_maps(pre_ptr, t, rows, N)
    dpre = pre_gradient(du_ptr, x_ptr, t, rows, C, N, BC, VEC, EVEN, pre, dx_ptr)
    for j in tl.static_range(N):
        tl.store(dpre_ptr + t * N + j, dpre[j], mask=rows)


def pre_forward(x: torch.Tensor, h_pre: torch.Tensor) -> torch.Tensor:
    """x ``[T, n*C]``, fp32 h_pre ``[T, n]`` -> u ``[T, C]`` in the dtype of x."""
    tokens, n = h_pre.shape
    channels = x.shape[1] // n
    tile = fitted(FORWARD[n], channels)
    u = x.new_empty(tokens, channels)
    launch(
        pre_forward_kernel,
        (cdiv(tokens, tile.tokens) * cdiv(channels, tile.channels),),
        *(x, h_pre, u, tokens, channels),
        tile=tile,
        N=n,
        BT=tile.tokens,
        BC=tile.channels,
        EVEN=channels % tile.channels == 0,
    )
    return u


def pre_backward(
    du: torch.Tensor, x: torch.Tensor, h_pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """du ``[T, C]``, x ``[T, n*C]``, fp32 h_pre ``[T, n]`` -> fp32 dh_pre ``[T, n]`` and dx."""
    tokens, channels = du.shape
    n = h_pre.shape[1]
    tile = fitted(BACKWARD[n], channels)
    dpre, dx = torch.empty_like(h_pre), torch.empty_like(x)
    launch(
        pre_backward_kernel,
        (cdiv(tokens, tile.tokens),),
        *(du, x, h_pre, dpre, dx, tokens, channels),
        tile=tile,
        N=n,
        BT=tile.tokens,
        BC=tile.channels,
        VEC=8,
        EVEN=channels % tile.channels == 0,
    )
    return dpre, dx
