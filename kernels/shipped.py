"""Every kernel that one training step of one mHC sublayer starts, as the launches that ship.

The autograd functions run on meta tensors, so that tiles, constants and tensors are those of a real
step, and neither a GPU nor memory is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.kernels.autograd.fused_edge import Read, Write, WriteRead
from megatron_mhc.kernels.autograd.ops import Mapping, MappingSettings, PostRes, Pre, Sinkhorn
from megatron_mhc.kernels.defaults import NORM_EPS
from megatron_mhc.kernels.triton.launch import Launch, record_launches

ITERATIONS = 20
DROPOUT = 0.1


def shipped_launches(
    num_streams: int, channels: int, tokens: int, dtype: torch.dtype
) -> list[Launch]:
    """Forward and backward, op by op and at the fused edge, with bias and dropout and without.

    Args:
        num_streams: n; channels: C; tokens: T.
        dtype: of the streams.

    Returns:
        One launch for each kernel and set of constants, in the order of a step.
    """
    shape = (num_streams, channels, tokens, dtype)
    launches = []
    for dropout in (0.0, DROPOUT):
        launches += op_launches(*shape, dropout) + fused_edge_launches(*shape, dropout)
    return distinct(launches)


def op_launches(
    n: int, channels: int, tokens: int, dtype: torch.dtype, dropout: float = 0.0
) -> list[Launch]:
    """One sublayer whose ops are called one by one, and Sinkhorn on its own.

    The sublayer itself is the identity; its output has a bias where ``dropout`` > 0.
    """
    x, parameters, output = _inputs(n, channels, tokens, dtype, dropout)
    logits = _leaf(tokens, n, n)
    with record_launches() as launches:
        h_pre, h_post, h_res = Mapping.apply(x, *parameters)
        u = Pre.apply(x, h_pre)
        _backward(PostRes.apply(x, u, h_post, h_res, *output))
        _backward(Sinkhorn.apply(logits, ITERATIONS))
    return launches


def fused_edge_launches(
    n: int, channels: int, tokens: int, dtype: torch.dtype, dropout: float = 0.0
) -> list[Launch]:
    """Two sublayers with the fused edge between them; otherwise as ``op_launches``."""
    x, parameters, output = _inputs(n, channels, tokens, dtype, dropout)
    with record_launches() as launches:
        u, h_post, h_res, carried = Read.apply(x, *parameters)
        _, u, h_post, h_res, carried = WriteRead.apply(
            carried, u, h_post, h_res, *output, *parameters
        )
        _backward(Write.apply(carried, u, h_post, h_res, *output))
    return launches


def distinct(launches: list[Launch]) -> list[Launch]:
    """The first launch of each kernel with its constants and options."""
    kept: dict[tuple[object, ...], Launch] = {}
    for launch in launches:
        key = (launch.name, *launch.constants.items(), *launch.options.items())
        kept.setdefault(key, launch)
    return list(kept.values())


def _inputs(
    n: int, channels: int, tokens: int, dtype: torch.dtype, dropout: float
) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """Streams, the mapping's parameters with its settings, and y's bias, dropout and seed."""
    m = n * n + 2 * n
    settings = MappingSettings(n, ITERATIONS, NORM_EPS, 'auto')
    parameters = (_leaf(m, n * channels), _leaf(m), settings, *(_leaf(1) for _ in range(3)))
    seed = torch.empty(1, dtype=torch.int64, device='meta')
    output = (_leaf(channels, dtype=dtype), dropout, seed) if dropout else (None, 0.0, None)
    return _leaf(tokens, n * channels, dtype=dtype), parameters, output


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device='meta', requires_grad=True)


def _backward(result: Tensor) -> None:
    result.backward(torch.empty_like(result))
