"""A sublayer's two ends as functions that write the gradient of the streams once.

``Read`` is the mapping and F_pre, ``Write`` is F_post,res, ``WriteRead`` the fused edge:
F_post,res of one sublayer and ``Read`` of the next in one pass over the streams.

The streams reach F_post,res as the output ``carried`` of ``Read``. What flows back through it is
not its gradient but g, the gradient of F_post,res's *output*: ``Read`` multiplies by H_res itself,
together with everything else that belongs to dX. ``carried`` must therefore be given to ``Write``
or ``WriteRead`` with the maps it came with, and to nothing else; any other use of the streams
belongs to ``x`` (or ``x_new``), whose gradient is complete.

Tokens may have any leading dimensions. They are flattened in here, where autograd does not see it:
nine views of a sublayer would each be a node of its graph, which takes longer than all launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.autograd.ops import (
    MappingSettings,
    bias_gradient,
    single,
    small_gradients,
)
from megatron_mhc.kernels.triton.maps import maps_backward, maps_forward
from megatron_mhc.kernels.triton.post_res import post_res_backward, post_res_forward
from megatron_mhc.kernels.triton.projection import post_res_project, project
from megatron_mhc.kernels.triton.read_backward import backward_precision, read_backward


class Read(Function):
    """x ``[..., n*C]`` -> u ``[..., C]``, h_post, h_res, carried."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        settings: MappingSettings,
        *alpha: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.lead = settings, x.shape[:-1]
        x = rows(x)
        partial, squares = project(x, weight, settings.num_streams, settings.precision)
        outputs, saved = _read(x, ctx.lead, partial, squares, bias, alpha, settings)
        ctx.save_for_backward(x, weight, bias, *saved, *alpha)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, *mapping_grads = _read_backward(ctx.saved_tensors, ctx.settings, *grads)
        return dx.view(*ctx.lead, -1), *mapping_grads


class Write(Function):
    """carried, y ``[..., C]`` and the maps it came with -> x_new ``[..., n*C]``."""

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
        ctx.dropout, ctx.lead = dropout, carried.shape[:-1]
        carried, y, h_post, h_res = rows(carried), rows(y), rows(h_post), rows(h_res, 2)
        ctx.save_for_backward(carried, y, h_post, y_bias, seed)
        out = post_res_forward(carried, y, h_post, h_res, y_bias, dropout, seed)
        return _own(out, ctx.lead)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_write_backward(rows(g), ctx.saved_tensors, ctx.dropout, ctx.lead), None, None


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
        settings: MappingSettings,
        *alpha: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.dropout, ctx.lead = settings, dropout, carried.shape[:-1]
        carried, y, h_post, h_res = rows(carried), rows(y), rows(h_post), rows(h_res, 2)
        partial, squares, x_new = post_res_project(
            carried, y, h_post, h_res, weight, settings.precision, y_bias, dropout, seed
        )
        outputs, saved = _read(x_new, ctx.lead, partial, squares, bias, alpha, settings)
        ctx.save_for_backward(
            *(carried, y, h_post, y_bias, seed), *(x_new, weight, bias, *saved, *alpha)
        )
        # With a version of its own: a hook between layers may change the streams in place. The next
        # layer then reads them again, and what was read ahead of it gets no gradient.
        return _own(x_new, ctx.lead).data, *outputs

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
            g = g + rows(dx_new)
        *write_grads, dbias_y = _write_backward(g, written, ctx.dropout, ctx.lead)
        return *write_grads, dbias_y, None, None, *mapping_grads


def _read(
    x: Tensor,
    lead: Sequence[int],
    partial: Tensor,
    squares: Tensor,
    bias: Tensor,
    alpha: Sequence[Tensor],
    settings: MappingSettings,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of ``Read``, and what its backward needs beside x and the parameters."""
    n, iterations, norm_eps, _ = settings
    u, h_post, h_res, proj, inv = maps_forward(
        partial, squares, bias, single(alpha), x, n, iterations, norm_eps, lead, with_u=True
    )
    return (u, h_post, h_res, _own(x, lead)), (proj, inv, h_res)


def _read_backward(
    saved: tuple[Tensor, ...],
    settings: MappingSettings,
    du: Tensor | None,
    dpost: Tensor | None,
    dres: Tensor | None,
    g: Tensor | None,
) -> tuple[Any, ...]:
    """dX, all terms at once, and the gradients of phi, b, the settings (none) and alpha."""
    x, weight, bias, proj, inv, h_res, *alpha = saved
    tokens, n = x.shape[0], settings.num_streams
    du, g = None if du is None else rows(du), None if g is None else rows(g)
    dpre = proj.new_zeros(tokens, n) if du is None else None
    dpost = proj.new_zeros(tokens, n) if dpost is None else rows(dpost)
    dres = torch.zeros_like(h_res) if dres is None else dres.contiguous()
    precision = backward_precision(settings.precision, x.dtype, n)
    h_pre, dproj, dnorm, sums = maps_backward(
        *(dpre, dpost, dres, proj, inv, bias, single(alpha), x),
        *(settings.sinkhorn_iterations, precision, du),
    )
    dx, dweight = read_backward(
        *(x, weight, dproj, dnorm, precision),
        *(g, h_res if g is not None else None, du, h_pre),
    )
    return dx, dweight, *small_gradients(sums, alpha)


def _write_backward(
    g: Tensor, saved: tuple[Any, ...], dropout: float, lead: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """For carried g itself (see above), then dy, dh_post, dh_res and the bias."""
    carried, y, h_post, y_bias, seed = saved
    dy, dpost, dres, _ = post_res_backward(g, carried, y, h_post, None, y_bias, dropout, seed)
    grads = g.view(*lead, -1), dy.view(*lead, -1), dpost.view(*lead, -1)
    return *grads, dres.view(*lead, *dres.shape[1:]), bias_gradient(dy, y_bias)


def rows(tensor: Tensor, tail: int = 1) -> Tensor:
    """All but the last ``tail`` dimensions flattened to T, as the kernels take it."""
    return tensor.reshape(-1, *tensor.shape[-tail:]).contiguous()


def _own(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """``[T, ...]`` as an output that autograd takes for no view, which nobody could change."""
    return tensor.view(*lead, *tensor.shape[1:]).detach()
