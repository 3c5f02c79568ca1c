"""One differentiable function per op, for callers that bring their own maps or mapping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.triton.maps import maps_backward, maps_forward
from megatron_mhc.kernels.triton.post_res import post_res_backward, post_res_forward
from megatron_mhc.kernels.triton.pre import pre_backward, pre_forward
from megatron_mhc.kernels.triton.projection import project
from megatron_mhc.kernels.triton.read_backward import backward_precision, read_backward
from megatron_mhc.kernels.triton.sinkhorn import sinkhorn_backward, sinkhorn_forward


class MappingSettings(NamedTuple):
    """What determines the mapping besides its tensors."""

    num_streams: int
    sinkhorn_iterations: int
    norm_eps: float
    precision: str


class Sinkhorn(Function):
    """fp32 logits ``[T, n, n]`` -> H_res. Saves the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        return sinkhorn_forward(logits, iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        return sinkhorn_backward(grad.contiguous(), logits, ctx.iterations), None


class Mapping(Function):
    """Streams ``[T, n*C]`` -> h_pre, h_post, h_res. Saves n*n + 2n + 1 numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        settings: MappingSettings,
        *alpha: Tensor,
    ) -> tuple[Tensor, ...]:
        n, iterations, norm_eps, precision = settings
        partial, squares = project(x, weight, n, precision)
        *maps, proj, inv = maps_forward(
            *(partial, squares, bias, single(alpha), x, n, iterations, norm_eps, x.shape[:1]),
            with_u=False,
        )
        ctx.save_for_backward(x, weight, bias, proj, inv, *alpha)
        ctx.settings = settings
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, proj, inv, *alpha = ctx.saved_tensors
        dpre, dpost, dres = (grad.contiguous() for grad in grads)
        n, iterations, _, precision = ctx.settings
        precision = backward_precision(precision, x.dtype, n)
        _, dproj, dnorm, sums = maps_backward(
            dpre, dpost, dres, proj, inv, bias, single(alpha), x, iterations, precision
        )
        dx, dweight = read_backward(x, weight, dproj, dnorm, precision)
        return dx, dweight, *small_gradients(sums, alpha)


class Pre(Function):
    """Streams ``[T, n*C]`` and h_pre ``[T, n]`` -> ``[T, C]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h_pre: Tensor) -> Tensor:
        ctx.save_for_backward(x, h_pre)
        return pre_forward(x, h_pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, Tensor]:
        x, h_pre = ctx.saved_tensors
        dpre, dx = pre_backward(du.contiguous(), x, h_pre)
        return dx, dpre


class PostRes(Function):
    """Streams, y ``[T, C]`` and maps -> the next streams. The dropout mask is its seed."""

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
        return post_res_forward(x, y, h_post, h_res, bias, dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, h_post, h_res, bias, seed = ctx.saved_tensors
        dy, dpost, dres, dx = post_res_backward(
            g.contiguous(), x, y, h_post, h_res, bias, ctx.dropout, seed
        )
        return dx, dy, dpost, dres, bias_gradient(dy, bias), None, None


def single(alpha: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gating factors of pre, post and res: three tensors ``[1]``, or one ``[3]`` of them."""
    return alpha if len(alpha) == 3 else alpha[0].unbind()


def small_gradients(sums: Tensor, alpha: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of b, of the settings (none) and of ``alpha`` as it was given: views of one tensor."""
    sizes = [len(sums) - 3, *(len(factor) for factor in alpha)]
    dbias, *dalpha = sums.split_with_sizes(sizes)
    return dbias, None, *dalpha


def bias_gradient(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    """The sublayer's bias is added to every token."""
    return None if bias is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)
