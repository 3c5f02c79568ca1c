"""What is timed: one shape with its tensors, in Megatron's layout, streams flattened outermost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc.kernels.peers.contender import LAYER, Case


class Inputs(NamedTuple):
    """Tensors of one case. ``d_`` is the gradient that arrives at an output."""

    x: Tensor  # [T, 1, n*C]
    y: tuple[Tensor, ...]  # [T, 1, C] each
    params: tuple[tuple[Tensor, Tensor, Tensor], ...]  # weight [M, n*C], bias [M], alpha [3]
    logits: Tensor  # [T, 1, n, n]
    h_pre: Tensor  # [T, 1, n]
    h_post: Tensor  # [T, 1, n]
    h_res: Tensor  # [T, 1, n, n]
    d_x: Tensor
    d_u: tuple[Tensor, ...]
    d_pre: Tensor
    d_post: Tensor
    d_res: Tensor


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Random tensors at the scales of training: unit streams, logits of order one, maps in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    n, rows, width = case.streams, case.maps, case.streams * case.hidden

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    def streams(size: int) -> Tensor:
        return normal(case.tokens, 1, size, dtype=case.torch_dtype)

    def maps(*shape: int) -> Tensor:
        return normal(case.tokens, 1, *shape)

    def params() -> tuple[Tensor, Tensor, Tensor]:
        weight = normal(rows, width) / math.sqrt(width)
        return weight, 0.5 * normal(rows), 1 + 0.1 * normal(3)

    return Inputs(
        x=streams(width),
        y=tuple(streams(case.hidden) for _ in range(LAYER)),
        params=tuple(params() for _ in range(LAYER)),
        logits=maps(n, n),
        h_pre=torch.sigmoid(maps(n)),
        h_post=2 * torch.sigmoid(maps(n)),
        h_res=torch.softmax(maps(n, n), dim=-1),
        d_x=streams(width),
        d_u=tuple(streams(case.hidden) for _ in range(LAYER)),
        d_pre=maps(n),
        d_post=maps(n),
        d_res=maps(n, n),
    )


def in_double(inputs: Inputs) -> Inputs:
    """The same numbers in fp64: what the exact result is a function of."""

    def double(value):
        return value.double() if isinstance(value, Tensor) else tuple(map(double, value))

    return Inputs(*map(double, inputs))


def all_cases(
    hidden: Iterable[int], tokens: Iterable[int], streams: Iterable[int], dtype: str
) -> list[Case]:
    """Every combination, those that the headline is made of first."""
    cases = [Case(c, t, n, dtype) for n in streams for t in tokens for c in hidden]
    return sorted(cases, key=lambda case: not case.headline)
