"""The three maps of one sublayer from its streams (mHC, arXiv 2512.24880, Eq 14-19)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.defaults import NORM_EPS
from megatron_mhc.kernels.reference.precision import at_least_fp32, without_autocast
from megatron_mhc.kernels.reference.sinkhorn import sinkhorn_ref


def scaled_projection_ref(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, norm_eps: float
) -> Tensor:
    """scale * (v phi) / r + b with r = ||v|| / sqrt(nC): the norm after the matmul (Eq 14-16).

    Args:
        x: ``[..., K]`` any float dtype; weight: ``[M, K]``; bias and scale: ``[M]``.
        norm_eps: added to the mean square under the root.

    Returns:
        ``[..., M]`` in fp32 (fp64 for fp64 x). NaN for a token whose sum of squares fp32 cannot
        hold: a root mean square over 1.8e19 / sqrt(nC), 1.4e17 at nC = 16384. Scaled by the largest
        value first it would be finite; to find that one is another read of the streams.
    """
    with without_autocast(x.device):
        # Contiguous, so that a view has the bits of its copy: the order of sums follows strides.
        v = at_least_fp32(x).contiguous()
        h: Tensor = _ScaledProjection.apply(
            v, *(t.to(v.dtype) for t in (weight, bias, scale)), norm_eps
        )
        return h


class _ScaledProjection(Function):
    """``scaled_projection_ref`` of one dtype.

    The gradient reads and writes the streams once where autograd's of the mean square does so four
    times. With h = v phi: dL/dv = (g scale / r) phi^T - v * sum(g scale h) / (r^3 nC).
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, norm_eps: float
    ) -> Tensor:
        # Eq 14: one projection for all maps
        h = torch.nn.functional.linear(v, weight)
        # Eq 15: r = ||v|| / sqrt(nC)
        r = (v.square().mean(dim=-1, keepdim=True) + norm_eps).sqrt()
        # A sum of squares beyond fp32: h / inf would pass for maps of the biases alone.
        r = r.masked_fill(r.isinf(), torch.nan)
        # Eq 16: scale after the matmul, bias after the division
        h = h / r
        ctx.save_for_backward(v, weight, scale, h, r)
        ctx.bias_shape = bias.shape
        return h * scale + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight, scale, normed, r = ctx.saved_tensors
        of_normed = grad * scale
        of_h = of_normed / r
        of_v = of_weight = None
        if ctx.needs_input_grad[0]:
            of_square = (of_normed * normed).sum(-1, keepdim=True) / (-v.shape[-1] * r * r)
            of_v = (of_h @ weight).addcmul_(v, of_square)
        if ctx.needs_input_grad[1]:
            # One token of shape ``[nC]`` has no dimensions to flatten.
            of_weight = of_h.reshape(-1, of_h.shape[-1]).mT @ v.reshape(-1, v.shape[-1])
        of_bias = grad.sum_to_size(ctx.bias_shape)
        of_scale = (grad * normed).sum_to_size(scale.shape)
        return of_v, of_weight, of_bias, of_scale, None


def mapping_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_streams: int,
    sinkhorn_iterations: int = 20,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre = sigma, H_post = 2 sigma, H_res = Sinkhorn of the projected streams (Eq 17-19).

    Args:
        x: ``[..., n*C]``; weight: ``[n*n + 2n, n*C]``, rows pre | post | res (row-major);
        bias: ``[n*n + 2n]``; alpha: ``[3]``, the gating factors of pre, post, res.

    Returns:
        ``h_pre [..., n]``, ``h_post [..., n]``, ``h_res [..., n, n]`` in fp32 (fp64 for fp64 x).
    """
    n = num_streams
    scale = torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)])
    logits = scaled_projection_ref(x, weight, bias, scale, norm_eps)
    pre, post, res = logits.split([n, n, n * n], dim=-1)
    h_res = sinkhorn_ref(res.unflatten(-1, (n, n)), sinkhorn_iterations)
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), h_res
