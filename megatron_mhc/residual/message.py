"""Streams and H_pre as one tensor, where nothing else gets across: stages and recomputed layers.

A pipeline sends one tensor of one type, and a checkpoint returns one. A message is
``[s, b, width]`` of the streams' type. In memory all streams come first, so that who receives them
need not copy, and then H_pre: where streams have 16 bits, the bits of its fp32 in three values,
because rounding it would change the model. Gradients go back in the same form.
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


def pack(x: Tensor, h_pre: Tensor) -> Tensor:
    """Streams ``[s, b, n*C]`` and H_pre ``[s, b, n]`` -> message ``[s, b, width]``, a copy."""
    message: Tensor = _Pack.apply(x, h_pre.to(at_least_fp32(x).dtype))
    return message


def unpack(message: Tensor, num_streams: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Message -> streams ``[s, b, n*C]``, in its memory, and H_pre ``[s, b, n]``.

    A message belongs to one reader: bits cannot be added, as gradients of two readers would be.
    """
    x, h_pre = _Unpack.apply(message, num_streams, hidden_size)
    return x, h_pre


class _Pack(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h_pre: Tensor) -> Tensor:
        ctx.sizes = h_pre.shape[-1], x.shape[-1] // h_pre.shape[-1]
        return _joined(x, h_pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _parts(grad, *ctx.sizes)


class _Unpack(Function):
    @staticmethod
    def forward(
        ctx: Any, message: Tensor, num_streams: int, hidden_size: int
    ) -> tuple[Tensor, Tensor]:
        view, h_pre = _parts(message, num_streams, hidden_size)
        # Without a base, as Megatron wants what it may free.
        x = torch.empty(0, dtype=view.dtype, device=view.device)
        x.data = view
        return x, h_pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_pre: Tensor) -> tuple[Tensor, None, None]:
        return _joined(grad_x, grad_pre), None, None


def _joined(x: Tensor, h_pre: Tensor) -> Tensor:
    values = _as_values(h_pre, x.dtype)
    *tokens, n, parts = values.shape
    message = x.new_empty(*tokens, x.shape[-1] + n * parts)
    line = message.view(-1)
    line[: x.numel()].view(x.shape).copy_(x)
    line[x.numel() :].view(values.shape).copy_(values)
    return message


def _parts(message: Tensor, num_streams: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    *tokens, width = message.shape
    wide = num_streams * hidden_size
    line = message.contiguous().view(-1)
    streams = line.numel() // width * wide
    values = line[streams:].view(*tokens, num_streams, (width - wide) // num_streams)
    return line[:streams].view(*tokens, wide), _from_values(values)


def _as_values(h_pre: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., n]`` -> ``[..., n, 1 or 3]`` of ``dtype``."""
    if h_pre.dtype == dtype:
        return h_pre.unsqueeze(-1)
    bits = h_pre.contiguous().view(torch.int32).unsqueeze(-1)
    return ((bits >> _shifts(bits)) & ((1 << _BITS) - 1)).to(torch.int16).view(dtype)


def _from_values(values: Tensor) -> Tensor:
    if values.shape[-1] == 1:
        return values.squeeze(-1).clone()
    bits = values.view(torch.int16).to(torch.int32)
    return (bits << _shifts(bits)).sum(dim=-1, dtype=torch.int32).view(torch.float32)


def _shifts(bits: Tensor) -> Tensor:
    return torch.arange(0, 32, _BITS, dtype=torch.int32, device=bits.device)
