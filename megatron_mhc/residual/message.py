"""Streams and what belongs to them as one tensor, where nothing else gets across.

A pipeline sends one tensor of one type, and a recomputed part returns one. A message is
``[s, b, width]`` of the streams' type. In memory all streams come first, so that who receives them
need not copy, and then what is beside them, H_pre or token ids: where streams have 16 bits, the
bits of its fp32 in three values, because rounding it would change the model. Gradients go back in
the same form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.reference.precision import at_least_fp32

# Of each value: none is then infinite or NaN in bf16 or fp16, which checks of what is sent, such
# as torch's for NCCL, would take for a fault.
_BITS = 11


def pack(x: Tensor, beside: Tensor) -> Tensor:
    """Streams ``[s, b, n*C]`` and ``[s, b, k]`` beside them -> a copy, ``[s, b, width]``."""
    message: Tensor = _Pack.apply(x, beside.to(at_least_fp32(x).dtype))
    return message


def unpack(message: Tensor, count: int, wide: int) -> tuple[Tensor, Tensor]:
    """Message -> streams ``[s, b, wide]``, in its memory, and ``[s, b, count]`` beside them.

    A message belongs to one reader: bits cannot be added, as gradients of two readers would be.
    """
    x, beside = _Unpack.apply(message, count, wide)
    return x, beside


class _Pack(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beside: Tensor) -> Tensor:
        ctx.sizes = beside.shape[-1], x.shape[-1]
        return _joined(x, beside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _parts(grad, *ctx.sizes)


class _Unpack(Function):
    @staticmethod
    def forward(ctx: Any, message: Tensor, count: int, wide: int) -> tuple[Tensor, Tensor]:
        view, beside = _parts(message, count, wide)
        # Without a base, as Megatron wants what it may free.
        x = torch.empty(0, dtype=view.dtype, device=view.device)
        x.data = view
        return x, beside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_beside: Tensor) -> tuple[Tensor, None, None]:
        return _joined(grad_x, grad_beside), None, None


def _joined(x: Tensor, beside: Tensor) -> Tensor:
    values = _as_values(beside, x.dtype)
    *tokens, n, parts = values.shape
    message = x.new_empty(*tokens, x.shape[-1] + n * parts)
    line = message.view(-1)
    line[: x.numel()].view(x.shape).copy_(x)
    line[x.numel() :].view(values.shape).copy_(values)
    return message


def _parts(message: Tensor, count: int, wide: int) -> tuple[Tensor, Tensor]:
    *tokens, width = message.shape
    line = message.contiguous().view(-1)
    streams = line.numel() // width * wide
    values = line[streams:].view(*tokens, count, (width - wide) // count)
    return line[:streams].view(*tokens, wide), _from_values(values)


def _as_values(beside: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., k]`` -> ``[..., k, 1 or 3]`` of ``dtype``."""
    if beside.dtype == dtype:
        return beside.unsqueeze(-1)
    bits = beside.contiguous().view(torch.int32).unsqueeze(-1)
    return ((bits >> _shifts(bits)) & ((1 << _BITS) - 1)).to(torch.int16).view(dtype)


def _from_values(values: Tensor) -> Tensor:
    if values.shape[-1] == 1:
        return values.squeeze(-1).clone()
    bits = values.view(torch.int16).to(torch.int32)
    return (bits << _shifts(bits)).sum(dim=-1, dtype=torch.int32).view(torch.float32)


def _shifts(bits: Tensor) -> Tensor:
    return torch.arange(0, 32, _BITS, dtype=torch.int32, device=bits.device)
