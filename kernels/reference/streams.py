"""Reading a sublayer's input from the streams and writing its output back (mHC, Eq 3).

One function per op, whose backward is written out: it saves what it was given, in the dtype in
which it was given, and each pass over the streams writes into one tensor. Autograd of the same
multiply-adds would keep or write each of their products.

Sums over streams are multiply-adds, not a matmul, wherever a matmul may be told to use TF32, which
would round the maps to 10 bits when they are applied. A CPU has no TF32, and its matmul makes one
pass of a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.reference.dropout import dropout_scale_ref
from megatron_mhc.kernels.reference.precision import at_least_fp32, without_autocast


def pre_ref(x: Tensor, h_pre: Tensor) -> Tensor:
    """F_pre: sum_j h_pre[j] * x[j].

    Args:
        x: ``[..., n*C]``; h_pre: ``[..., n]``, applied in fp32 whatever the dtype of x.

    Returns:
        ``[..., C]`` in the dtype of x.
    """
    with without_autocast(x.device):
        u: Tensor = _Pre.apply(x, h_pre)
        return u


def post_res_ref(
    x: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """F_post,res: x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * dropout(y + bias).

    Args:
        x: ``[..., n*C]`` streams; y: ``[..., C]`` sublayer output; bias: ``[C]`` or None;
        h_post: ``[..., n]``; h_res: ``[..., n, n]``, both applied in fp32.
        dropout: probability of dropping an element of y + bias; seed: ``[1]`` int64, its mask.

    Returns:
        ``[..., n*C]`` in the dtype of x.
    """
    if dropout > 0 and seed is None:
        raise ValueError('seed: None, but dropout > 0 needs one; give [1] int64')
    with without_autocast(x.device):
        new: Tensor = _PostRes.apply(x, y, h_post, h_res, bias, dropout, seed)
        return new


class _Pre(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h_pre: Tensor) -> Tensor:
        ctx.save_for_backward(x, h_pre)
        streams, (h,) = as_streams(x, h_pre.shape[-1]), as_maps(x, h_pre.unsqueeze(-2))
        u = streams.new_empty(*x.shape[:-1], streams.shape[-1])
        mix(h, streams, u.view(-1, 1, u.shape[-1]))
        return u.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        x, h_pre = ctx.saved_tensors
        of_x = of_h = None
        g, (h,) = as_streams(du, 1), as_maps(x, h_pre.unsqueeze(-1))
        if ctx.needs_input_grad[0]:
            # du[c] * h_pre[j] is dL/dx[j, c].
            of_x = (h * g).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_h = products(g, as_streams(x, h_pre.shape[-1])).view(h_pre.shape).to(h_pre.dtype)
        return of_x, of_h


class _PostRes(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        bias: Tensor | None,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, y, h_post, h_res, bias, seed)
        ctx.dropout = dropout
        streams = as_streams(x, h_post.shape[-1])
        post, res = as_maps(x, h_post.unsqueeze(-1), h_res)
        written, _ = _written(streams, y, bias, dropout, seed)
        new = streams.new_empty(x.shape)
        mixed = mix(res, streams, new.view(streams.shape))
        mixed.addcmul_(post, written)
        return new.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, h_post, h_res, bias, seed = ctx.saved_tensors
        needs_x, needs_y, needs_post, needs_res, needs_bias, *_ = ctx.needs_input_grad
        g = as_streams(grad, h_post.shape[-1])
        post, res = as_maps(x, h_post.unsqueeze(-2), h_res)
        written, scale = _written(g, y, bias, ctx.dropout, seed)
        of_x = of_y = of_post = of_res = of_bias = None
        if needs_x:
            of_x = mix(res.mT, g, torch.empty_like(g)).view(x.shape).to(x.dtype)
        if needs_y or needs_bias:
            wide = mix(post, g, torch.empty_like(written)).squeeze(1)
            wide = wide if scale is None else wide.mul_(scale)
            of_y = wide.view(y.shape).to(y.dtype) if needs_y else None
            of_bias = wide.sum(0).to(bias.dtype) if needs_bias else None
        if needs_post:
            of_post = products(written, g).view(h_post.shape).to(h_post.dtype)
        if needs_res:
            inner = products(g, as_streams(x, h_post.shape[-1]))
            of_res = inner.view(h_res.shape).to(h_res.dtype)
        return of_x, of_y, of_post, of_res, of_bias, None, None


def as_streams(x: Tensor, n: int) -> Tensor:
    """``[..., n*C]`` -> ``[T, n, C]`` in fp32, or in fp64 where x is; a copy only if it must be."""
    return at_least_fp32(x).reshape(-1, n, x.shape[-1] // n)


def as_maps(x: Tensor, *maps: Tensor) -> list[Tensor]:
    """``[..., m, k]`` -> ``[T, m, k]`` in the dtype of ``as_streams(x)``.

    Contiguous, because a batched matmul of anything else is a loop over tokens.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [h.to(dtype).reshape(-1, *h.shape[-2:]).contiguous() for h in maps]


def _written(
    like: Tensor, y: Tensor, bias: Tensor | None, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dropout(y + bias) as ``[T, 1, C]``, and its factors ``[T, C]``; in the dtype of ``like``."""
    wide = y.to(like.dtype).reshape(-1, y.shape[-1])
    if bias is not None:
        wide = wide + bias.to(like.dtype)
    scale = None
    if dropout > 0:
        assert seed is not None
        scale = dropout_scale_ref(wide.shape[0], wide.shape[1], dropout, seed).to(like.dtype)
        wide = wide * scale
    return wide.unsqueeze(1), scale


def mix(h: Tensor, streams: Tensor, out: Tensor) -> Tensor:
    """``out[t, i] = sum_j h[t, i, j] * streams[t, j]``; h ``[T, m, k]``, streams ``[T, k, C]``."""
    if out.device.type == 'cpu':
        # beta = 0: what out holds is not read.
        return out.baddbmm_(h, streams, beta=0)
    first, *others = h.split(1, dim=-1)
    out.copy_(first * streams[:, :1])
    for j, column in enumerate(others, start=1):
        out.addcmul_(column, streams[:, j : j + 1])
    return out


def products(a: Tensor, b: Tensor) -> Tensor:
    """``[T, m, k]`` inner products of the streams of a ``[T, m, C]`` and b ``[T, k, C]``."""
    if a.device.type == 'cpu':
        return torch.bmm(a, b.mT)
    return torch.stack([(row.unsqueeze(1) * b).sum(-1) for row in a.unbind(1)], dim=1)
