"""Reading a sublayer's input from the streams and writing its output back (mHC, Eq 3).

Sums over streams are written as multiply-adds, not as a matmul: on a GPU that may be told to use
TF32 for every matmul, and the maps would then be rounded to 10 bits when they are applied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        streams = at_least_fp32(x).chunk(h_pre.shape[-1], dim=-1)
        return _mix(h_pre.to(streams[0].dtype), streams).to(x.dtype)


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
        streams = at_least_fp32(x).chunk(h_post.shape[-1], dim=-1)
        dtype = streams[0].dtype
        y = y.to(dtype)
        if bias is not None:
            y = y + bias.to(dtype)
        if dropout > 0:
            if seed is None:
                raise ValueError('seed: None, but dropout > 0 needs one; give [1] int64')
            channels = y.shape[-1]
            scale = dropout_scale_ref(y.numel() // channels, channels, dropout, seed)
            y = y * scale.to(dtype).view(y.shape)
        h_post, h_res = h_post.to(dtype), h_res.to(dtype)
        # x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * y
        new = [
            torch.addcmul(_mix(row, streams), gate, y)
            for row, gate in zip(h_res.unbind(-2), h_post.split(1, dim=-1), strict=True)
        ]
        return torch.cat(new, dim=-1).to(x.dtype)


def _mix(weights: Tensor, streams: Sequence[Tensor]) -> Tensor:
    """sum_j weights[..., j] * streams[j], in the order of the streams."""
    first, *others = weights.split(1, dim=-1)
    total: Tensor = first * streams[0]
    for weight, stream in zip(others, streams[1:], strict=True):
        total = torch.addcmul(total, weight, stream)
    return total
