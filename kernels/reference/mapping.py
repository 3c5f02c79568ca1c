"""The three maps of one sublayer from its streams (mHC, arXiv 2512.24880, Eq 14-19)."""

from __future__ import annotations

from collections.abc import Sequence
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
        dtype = torch.promote_types(x.dtype, torch.float32)
        h: Tensor = _ScaledProjection.apply(
            x, *(t.to(dtype) for t in (weight, bias, scale)), norm_eps
        )
        return h


class _ScaledProjection(Function):
    """``scaled_projection_ref`` with parameters of the dtype of its result. Saves x as it is.

    The gradient reads and writes the streams once where autograd's of the mean square does so four
    times. With h = v phi: dL/dv = (g scale / r) phi^T - v * sum(g scale h) / (r^3 nC).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, norm_eps: float
    ) -> Tensor:
        normed, r = normed_projection(x, weight, norm_eps)
        ctx.save_for_backward(x, weight, scale, normed, r)
        ctx.bias_shape = bias.shape
        # Eq 16: scale after the matmul, bias after the division
        return normed * scale + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, normed, r = ctx.saved_tensors
        of_x, of_weight = projection_gradient(
            grad * scale, x, weight, normed, r, None, ctx.needs_input_grad[:2]
        )
        of_bias = grad.sum_to_size(ctx.bias_shape)
        of_scale = (grad * normed).sum_to_size(scale.shape)
        return of_x, of_weight, of_bias, of_scale, None


def normed_projection(x: Tensor, weight: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """h / r ``[..., M]`` and r ``[..., 1]`` of x ``[..., K]`` and weight ``[M, K]``."""
    v = _wide(x)
    # Eq 14: one projection for all maps
    h = torch.nn.functional.linear(v, weight)
    # Eq 15: r = ||v|| / sqrt(nC)
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    r = (norm.square() / v.shape[-1] + norm_eps).sqrt()
    # A sum of squares beyond fp32: h / inf would pass for maps of the biases alone.
    r = r.masked_fill(r.isinf(), torch.nan)
    return h / r, r


def projection_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    normed: Tensor,
    r: Tensor,
    of_x: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dx ``[..., K]`` and dL/dweight from ``grad`` = dL/dnormed, where they are ``needed``.

    ``of_x`` is added to the former: what another use of x has as its gradient.
    """
    v = _wide(x)
    of_h = (grad / r).view(-1, grad.shape[-1])
    of_v = of_weight = None
    if needed[0]:
        if of_x is None:
            of_v = of_h @ weight
        else:
            of_v = torch.addmm(_wide(of_x).view(-1, v.shape[-1]), of_h, weight)
        of_square = (grad * normed).sum(-1, keepdim=True) / (-v.shape[-1] * r * r)
        of_v = of_v.view(v.shape).addcmul_(v, of_square)
    if needed[1]:
        of_weight = of_h.mT @ v.view(-1, v.shape[-1])
    return of_v, of_weight


def _wide(x: Tensor) -> Tensor:
    """Contiguous, so that a view has the bits of its copy: the order of sums follows strides."""
    return at_least_fp32(x).contiguous()


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
