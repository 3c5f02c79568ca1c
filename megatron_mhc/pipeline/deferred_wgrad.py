"""Weight gradients as an operation of their own, for the linear layers of a Megatron model.

A schedule that splits the backward runs I, the gradient of a stage's input, and W, the gradients of
its weights, at different times. Inside ``DeferredWgrads.collect`` the backward of tensor-parallel
linear layers computes input gradients and puts the weight gradients off; ``DeferredWgrads.run``
does them. Layers of Transformer Engine put theirs off by themselves (``delay_wgrad_compute``), and
their ``backward_dw`` is called here. Everything small (norms, biases, mappings) stays in I.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

Weight = Callable[[], None]
# What the backward that is running puts off; None: nothing is put off. One backward runs at a time,
# but on threads of autograd's own, which a context variable would not reach.
_pending: list[Weight] | None = None


class DeferredWgrads:
    """The weight gradients that one I left over, for one chunk and microbatch.

    Args:
        delayed: the chunk's ``delayed_modules``.
    """

    def __init__(self, delayed: list[Any]) -> None:
        self._pending: list[Weight] = []
        self._delayed = delayed

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Put off the weight gradients of a backward that runs inside the context."""
        global _pending
        _pending = self._pending
        try:
            yield
        finally:
            _pending = None

    def run(self) -> None:
        """Compute them, and add them to ``main_grad``."""
        for weight in self._pending:
            weight()
        self._pending.clear()
        for module in self._delayed:
            module.backward_dw()


def delayed_modules(chunk: nn.Module) -> list[Any]:
    """Transformer Engine layers of ``chunk`` that put off their weight gradients, last first.

    Each keeps its own first-in-first-out store, so that only the order of microbatches matters.
    """
    return [
        module
        for module in reversed(list(chunk.modules()))
        if (store := getattr(module, 'wgrad_store', None)) is not None
        and store.delay_wgrad_compute()
    ]


def mark_delayed_parameters(chunk: nn.Module) -> None:
    """Mark the parameters whose gradients ``backward_dw`` makes, for DistributedDataParallel.

    Transformer Engine does it itself, but marks as well the biases that it leaves to others to add,
    whose gradients are there in I and would be summed outside of ``main_grad``; and Megatron drops
    the mark of a bias that it initialises on the CPU, whose gradient would be lost.
    """
    for module in delayed_modules(chunk):
        for name, parameter in module.named_parameters(recurse=False):
            if not name.startswith('layer_norm'):
                added_by_others = name.startswith('bias') and module.return_bias
                parameter.skip_backward_post_hook = not added_by_others


class _Split(torch.autograd.Function):
    """``y + bias``, whose backward also takes care of the weight gradient of ``y = x W^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        bias: Tensor | None,
        held: tuple[nn.Parameter],
        fused: bool,
        sequence_group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x)
        # The weight comes in a tuple, out of autograd's sight: its gradient does not pass here.
        (ctx.weight,), ctx.fused, ctx.sequence_group = held, fused, sequence_group
        ctx.has_bias = bias is not None
        # In place, not as a view: what follows may write to it (the cross entropy does).
        ctx.mark_dirty(y)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # Core 0.20 may give logits another type than its input; its own backward casts as well.
        flat = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        weight, fused, group = ctx.weight, ctx.fused, ctx.sequence_group
        if _pending is None:
            _accumulate(weight, x, flat, fused, group)
        else:
            _pending.append(lambda: _accumulate(weight, x, flat, fused, group))
        return grad, None, flat.sum(dim=0) if ctx.has_bias else None, None, None, None


@torch.no_grad()
def _accumulate(weight: nn.Parameter, x: Tensor, grad: Tensor, fused: bool, group: Any) -> None:
    """``weight.main_grad += grad^T x``, as Megatron's own backward does it."""
    if group is not None:
        x = gather_from_sequence_parallel_region(x, group=group)
    x = x.reshape(-1, x.shape[-1])
    main_grad = getattr(weight, 'main_grad', None)
    if main_grad is None:
        gradient = grad.t().matmul(x)
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    elif fused:
        kernels = layers.fused_weight_gradient_mlp_cuda
        in_fp32 = main_grad.dtype == torch.float32
        add = kernels.wgrad_gemm_accum_fp32 if in_fp32 else kernels.wgrad_gemm_accum_fp16
        add(x, grad.contiguous(), main_grad)
    else:
        main_grad.add_(grad.t().matmul(x))


def split_linear(
    original: Callable[..., Tensor],
    input: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    *,
    tp_group: Any = None,
    **others: Any,
) -> Tensor:
    """Megatron's linear with its weight gradient split off.

    The arguments are those of ``linear_with_grad_accumulation_and_async_allreduce``, ``original``.
    The product and its input gradient are Megatron's own, for a frozen weight.
    """
    if others.pop('grad_output_buffer', None) is not None or others.get('gtp_remat_size', 1) > 1:
        raise NotImplementedError(
            'deferred embedding gradients and sharded weights cannot be split by a pipeline '
            'schedule; drop --defer-embedding-wgrad-compute, or use --pipeline-schedule 1f1b'
        )
    others.pop('wgrad_deferral_limit', None)
    if not (torch.is_grad_enabled() and input.requires_grad):
        # No backward, or one that begins at the weight and has nothing to run ahead of it.
        return original(
            input,
            weight,
            bias,
            gradient_accumulation_fusion,
            allreduce_dgrad,
            sequence_parallel,
            tp_group=tp_group,
            **others,
        )
    tp_group = layers.get_tensor_model_parallel_group_if_none(tp_group)
    y = layers.linear_with_frozen_weight(
        input,
        weight.detach(),
        None,
        gradient_accumulation_fusion,
        allreduce_dgrad,
        sequence_parallel,
        tp_group=tp_group,
        **others,
    )
    group = tp_group if sequence_parallel else None
    return _Split.apply(y, input.detach(), bias, (weight,), gradient_accumulation_fusion, group)
