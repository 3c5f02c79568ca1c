"""Reading a sublayer's input from the streams and writing its output back (mHC, Eq 3).

Sums over streams are written as multiply-adds, not as a matmul: on a GPU that may be told to use
TF32 for every matmul, and the maps would then be rounded to 10 bits when they are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        streams = at_least_fp32(x)
        u: Tensor = _Mix.apply(h_pre.to(streams.dtype).unsqueeze(-2), streams)
        return u.to(x.dtype)


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
    with without_autocast(x.device):
        streams = at_least_fp32(x)
        dtype = streams.dtype
        y = y.to(dtype)
        if bias is not None:
            y = y + bias.to(dtype)
        if dropout > 0:
            if seed is None:
                raise ValueError('seed: None, but dropout > 0 needs one; give [1] int64')
            channels = y.shape[-1]
            scale = dropout_scale_ref(y.numel() // channels, channels, dropout, seed)
            y = y * scale.to(dtype).view(y.shape)
        # x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * y
        maps = torch.cat([h_res.to(dtype), h_post.to(dtype).unsqueeze(-1)], dim=-1)
        new: Tensor = _Mix.apply(maps, streams, y)
        return new.to(x.dtype)


class _Mix(Function):
    """out[i] = sum_j h[i, j] * s[j] over the streams s of all ``blocks``, one after another.

    Autograd of the multiply-adds alone would write each of their products: five times as long.

    Args:
        h: ``[..., m, k]``; blocks: ``[..., k1*C]``, ``[..., k2*C]``, ... with k1 + k2 + ... = k.

    Returns:
        ``[..., m*C]``.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, *blocks: Tensor) -> Tensor:
        ctx.save_for_backward(h, *blocks)
        channels = sum(block.shape[-1] for block in blocks) // h.shape[-1]
        streams = [stream for block in blocks for stream in block.split(channels, dim=-1)]
        return torch.cat([_mix(row, streams) for row in h.unbind(-2)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, *blocks = ctx.saved_tensors
        grads = grad.chunk(h.shape[-2], dim=-1)
        channels = grads[0].shape[-1]
        of_h = None
        if ctx.needs_input_grad[0]:
            of_h = torch.cat([_products(grad, block, channels) for block in blocks], dim=-1)
        columns, of_blocks = iter(h.unbind(-1)), []
        for block, needed in zip(blocks, ctx.needs_input_grad[1:], strict=True):
            own = [next(columns) for _ in range(block.shape[-1] // channels)]
            mixed = torch.cat([_mix(column, grads) for column in own], -1) if needed else None
            of_blocks.append(mixed)
        return of_h, *of_blocks


def _products(a: Tensor, b: Tensor, channels: int) -> Tensor:
    """``[..., m, k]`` inner products of the streams of a ``[..., m*C]`` and b ``[..., k*C]``."""
    first, second = (t.unflatten(-1, (-1, channels)) for t in (a, b))
    if a.device.type == 'cpu':
        return torch.matmul(first, second.mT)
    # No matmul on a GPU, as above.
    return torch.stack([(row.unsqueeze(-2) * second).sum(-1) for row in first.unbind(-2)], dim=-2)


def _mix(weights: Tensor, streams: Sequence[Tensor]) -> Tensor:
    """sum_j weights[..., j] * streams[j], in the order of the streams."""
    first, *others = weights.split(1, dim=-1)
    total: Tensor = first * streams[0]
    for weight, stream in zip(others, streams[1:], strict=True):
        total = torch.addcmul(total, weight, stream)
    return total
