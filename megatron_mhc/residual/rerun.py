"""A function whose inputs alone are kept for the backward, which runs it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Computed = Callable[..., tuple[Tensor, ...]]


def rerun(function: Computed, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, without what it saves in between: maps in fp32 of every channel.

    Args:
        function: pure, without randomness; its other arguments are bound.
        tensors: all that may need a gradient.
    """
    if torch.compiler.is_compiling():
        # Which decides by itself what to keep, and cannot trace a backward within a backward.
        return function(*tensors)
    results: tuple[Tensor, ...] = _Rerun.apply(function, *tensors)
    return results


class _Rerun(Function):
    @staticmethod
    def forward(ctx: Any, function: Computed, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            results = ctx.function(*inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(results, wanted, grads, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
