"""Reading a sublayer's input from the streams and writing its output back (mHC, Eq 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.kernels.reference.precision import at_least_fp32, without_autocast


def pre_ref(x: Tensor, h_pre: Tensor) -> Tensor:
    """F_pre: sum_j h_pre[j] * x[j].

    Args:
        x: ``[..., n*C]``; h_pre: ``[..., n]``, applied in fp32 whatever the dtype of x.

    Returns:
        ``[..., C]`` in the dtype of x.
    """
    with without_autocast(x.device):
        streams = at_least_fp32(x).unflatten(-1, (h_pre.shape[-1], -1))
        return torch.matmul(h_pre.to(streams.dtype).unsqueeze(-2), streams).squeeze(-2).to(x.dtype)


def post_res_ref(
    x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, bias: Tensor | None = None
) -> Tensor:
    """F_post,res: x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * (y + bias).

    Args:
        x: ``[..., n*C]`` streams; y: ``[..., C]`` sublayer output; bias: ``[C]`` or None;
        h_post: ``[..., n]``; h_res: ``[..., n, n]``, both applied in fp32.

    Returns:
        ``[..., n*C]`` in the dtype of x.
    """
    with without_autocast(x.device):
        streams = at_least_fp32(x).unflatten(-1, (h_post.shape[-1], -1))
        y = y.to(streams.dtype)
        if bias is not None:
            y = y + bias.to(streams.dtype)
        mixed = torch.matmul(h_res.to(streams.dtype), streams)
        written = h_post.to(streams.dtype).unsqueeze(-1) * y.unsqueeze(-2)
        return (mixed + written).flatten(-2).to(x.dtype)
