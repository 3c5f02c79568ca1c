"""The mapping and F_pre of a sublayer in one function, for the torch path (mHC, Eq 3, 14-19).

Three ops use the streams of a sublayer: the mapping, F_pre and F_post,res. Each by itself would
write a gradient as large as the streams, and autograd would add them. Here the streams go on to
F_post,res as the output ``carried``, so that what it sends back is at hand when the other two terms
are added to it: one tensor is written. Its equations are those of ``mapping_ref`` and ``pre_ref``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.reference.mapping import normed_projection, projection_gradient
from megatron_mhc.kernels.reference.precision import without_autocast
from megatron_mhc.kernels.reference.sinkhorn import sinkhorn_gradient, sinkhorn_passes
from megatron_mhc.kernels.reference.streams import as_streams, mix, products


def read_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_streams: int,
    sinkhorn_iterations: int,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mapping_ref`` and ``pre_ref``; arguments as there.

    Returns:
        u ``[..., C]`` in the dtype of x, h_post ``[..., n]``, h_res ``[..., n, n]``, and x again,
        for F_post,res. Any use of either x gives the gradient that it should.
    """
    with without_autocast(x.device):
        dtype = torch.promote_types(x.dtype, torch.float32)
        parameters = (t.to(dtype) for t in (weight, bias, alpha))
        u, h_post, h_res, carried = _Read.apply(
            x, *parameters, num_streams, sinkhorn_iterations, norm_eps
        )
        return u, h_post, h_res, carried


class _Read(Function):
    """Saves x, the parameters, and n*n + 4n + 1 numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        alpha: Tensor,
        n: int,
        iterations: int,
        norm_eps: float,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        normed, r = normed_projection(x, weight, norm_eps)
        # Eq 16: scale after the matmul, bias after the division
        logits = torch.addcmul(bias, normed, _each(alpha, n))
        pre, post, _ = logits.split(_sizes(n), dim=-1)
        # Eq 17-19
        h_pre, h_post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
        h_res = sinkhorn_passes(_res(logits, n), iterations).movedim((0, 1), (-2, -1)).contiguous()
        streams = as_streams(x, n)
        u = streams.new_empty(*x.shape[:-1], streams.shape[-1])
        mix(h_pre.view(-1, 1, n), streams, u.view(-1, 1, u.shape[-1]))
        ctx.save_for_backward(x, weight, bias, alpha, normed, r, h_pre, h_post)
        ctx.iterations = iterations
        return u.to(x.dtype), h_post, h_res, x.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        du: Tensor | None,
        dpost: Tensor | None,
        dres: Tensor | None,
        of_carried: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, alpha, normed, r, h_pre, h_post = ctx.saved_tensors
        n = h_pre.shape[-1]
        g = None if du is None else as_streams(du, 1)
        # dL/dlogits through sigma, 2 sigma and Sinkhorn
        grad, scale = torch.zeros_like(normed), _each(alpha, n)
        of_pre, of_post, of_res = grad.split(_sizes(n), dim=-1)
        if g is not None:
            dpre = products(g, as_streams(x, n)).view(h_pre.shape)
            of_pre.copy_(dpre * h_pre * (1 - h_pre))
        if dpost is not None:
            of_post.copy_(dpost * h_post * (1 - 0.5 * h_post))
        if dres is not None:
            logits = _res(torch.addcmul(bias, normed, scale), n)
            of_logits = sinkhorn_gradient(logits, dres.movedim((-2, -1), (0, 1)), ctx.iterations)
            of_res.unflatten(-1, (n, n)).copy_(of_logits.movedim((0, 1), (-2, -1)))
        of_x, of_weight = projection_gradient(
            grad * scale, x, weight, normed, r, of_carried, ctx.needs_input_grad[:2]
        )
        if of_x is not None:
            if g is not None:
                # du[c] * h_pre[j] is F_pre's dL/dx[j, c].
                of_x.view(-1, n, g.shape[-1]).addcmul_(h_pre.view(-1, n, 1), g)
            of_x = of_x.to(x.dtype)
        of_bias = grad.sum_to_size(bias.shape)
        of_scale = (grad * normed).sum_to_size(bias.shape)
        of_alpha = torch.stack([part.sum() for part in of_scale.split(_sizes(n))])
        return of_x, of_weight, of_bias, of_alpha, None, None, None


def _sizes(n: int) -> list[int]:
    return [n, n, n * n]


def _each(alpha: Tensor, n: int) -> Tensor:
    """The factor of each map, ``[n*n + 2n]``."""
    return torch.cat([a.expand(size) for a, size in zip(alpha.unbind(), _sizes(n), strict=True)])


def _res(logits: Tensor, n: int) -> Tensor:
    """Of H_res, ``[n, n, ...]``: tokens last, so that sums over streams run along them."""
    matrices: Tensor = logits[..., 2 * n :].unflatten(-1, (n, n))
    return matrices.movedim((-2, -1), (0, 1)).contiguous()
