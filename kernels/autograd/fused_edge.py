"""A sublayer's two ends as functions that write the gradient of the streams once.

``Read`` is the mapping and F_pre, ``Write`` is F_post,res, ``WriteRead`` the fused edge:
F_post,res of one sublayer and ``Read`` of the next in one pass over the streams.

The streams reach F_post,res as the output ``carried`` of ``Read``. What flows back through it is
not its gradient but g, the gradient of F_post,res's *output*: ``Read`` multiplies by H_res itself,
together with everything else that belongs to dX. ``carried`` must therefore be given to ``Write``
or ``WriteRead`` with the maps it came with, and to nothing else; any other use of the streams
belongs to ``x`` (or ``x_new``), whose gradient is complete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.autograd.ops import MappingSettings, bias_gradient
from megatron_mhc.kernels.triton.maps import maps_backward, maps_forward
from megatron_mhc.kernels.triton.post_res import post_res_backward, post_res_forward
from megatron_mhc.kernels.triton.pre import pre_backward, pre_forward
from megatron_mhc.kernels.triton.projection import post_res_project, project
from megatron_mhc.kernels.triton.read_backward import backward_precision, read_backward


class Read(Function):
    """x ``[T, n*C]`` -> u ``[T, C]``, h_post, h_res, carried."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, settings: MappingSettings
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        partial, squares = project(x, weight, settings.num_streams, settings.precision)
        outputs, saved = _read(x, partial, squares, bias, alpha, settings)
        ctx.save_for_backward(x, weight, bias, alpha, *saved)
        ctx.settings = settings
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_read_backward(ctx.saved_tensors, ctx.settings, *grads), None


class Write(Function):
    """carried, y ``[T, C]`` and the maps it came with -> x_new ``[T, n*C]``."""

    @staticmethod
    def forward(
        ctx: Any,
        carried: Tensor,
        y: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        y_bias: Tensor | None,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(carried, y, h_post, y_bias, seed)
        ctx.dropout = dropout
        return post_res_forward(carried, y, h_post, h_res, y_bias, dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_write_backward(g.contiguous(), ctx.saved_tensors, ctx.dropout), None, None


class WriteRead(Function):
    """``Write`` and then ``Read`` of its result -> x_new, u, h_post, h_res, carried."""

    @staticmethod
    def forward(
        ctx: Any,
        carried: Tensor,
        y: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        y_bias: Tensor | None,
        dropout: float,
        seed: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        alpha: Tensor,
        settings: MappingSettings,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        partial, squares, x_new = post_res_project(
            carried, y, h_post, h_res, weight, settings.precision, y_bias, dropout, seed
        )
        outputs, saved = _read(x_new, partial, squares, bias, alpha, settings)
        ctx.save_for_backward(
            *(carried, y, h_post, y_bias, seed), *(x_new, weight, bias, alpha, *saved)
        )
        ctx.settings, ctx.dropout = settings, dropout
        return x_new, *outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dx_new: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Asked for once: each access would unpack, and maybe recompute, everything again.
        saved = ctx.saved_tensors
        written, read = saved[:5], saved[5:]
        g, *mapping_grads = _read_backward(read, ctx.settings, *grads)
        if dx_new is not None:
            g = g + dx_new
        *write_grads, dbias_y = _write_backward(g, written, ctx.dropout)
        return *write_grads, dbias_y, None, None, *mapping_grads, None


def _read(
    x: Tensor,
    partial: Tensor,
    squares: Tensor,
    bias: Tensor,
    alpha: Tensor,
    settings: MappingSettings,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of ``Read``, and what its backward needs beside x and the parameters."""
    h_pre, h_post, h_res, proj, inv = maps_forward(
        *(partial, squares, bias, alpha, settings.num_streams, x.shape[1]),
        *(settings.sinkhorn_iterations, settings.norm_eps),
    )
    return (pre_forward(x, h_pre), h_post, h_res, x.detach()), (proj, inv, h_res)


def _read_backward(
    saved: tuple[Tensor, ...],
    settings: MappingSettings,
    du: Tensor | None,
    dpost: Tensor | None,
    dres: Tensor | None,
    g: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, all terms at once, and the gradients of phi, b and alpha."""
    x, weight, bias, alpha, proj, inv, h_res = saved
    tokens, n = x.shape[0], settings.num_streams
    du, g = _contiguous(du), _contiguous(g)
    if du is None:
        dpre = proj.new_zeros(tokens, n)
    else:
        dpre, _ = pre_backward(du, x, None)
    dpost = proj.new_zeros(tokens, n) if dpost is None else dpost.contiguous()
    dres = torch.zeros_like(h_res) if dres is None else dres.contiguous()
    precision = backward_precision(settings.precision, x.dtype, n)
    h_pre, dproj, dnorm, dbias, dalpha = maps_backward(
        *(dpre, dpost, dres, proj, inv, bias, alpha, x.shape[1]),
        *(settings.sinkhorn_iterations, precision),
    )
    dx, dweight = read_backward(
        x, weight, dproj, dnorm, precision, g, h_res if g is not None else None,
        du, h_pre if du is not None else None,
    )  # fmt: skip
    return dx, dweight, dbias, dalpha


def _write_backward(g: Tensor, saved: tuple[Any, ...], dropout: float) -> tuple[Tensor | None, ...]:
    """For carried g itself (see above), then dy, dh_post, dh_res and the bias."""
    carried, y, h_post, y_bias, seed = saved
    dy, dpost, dres, _ = post_res_backward(g, carried, y, h_post, None, y_bias, dropout, seed)
    return g, dy, dpost, dres, bias_gradient(dy, y_bias)


def _contiguous(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()
