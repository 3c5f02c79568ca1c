"""A stand-in for Transformer Engine's attention where ranks share a sequence, for ``--spec``.

Keys and values of all context-parallel ranks are gathered, so that attention is exact; each rank
holds an early and a late chunk of the sequence, as Megatron's batches are cut.
"""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn


class Gathered(torch.autograd.Function):
    """The tokens of all ranks, one rank after another; each gets back the sum of its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group, parts = group, [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.contiguous()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None


class GatheredAttention(nn.Module):
    """Causal attention ``[s / cp, b, heads, d]`` -> ``[s / cp, b, heads * d]``."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        rank, size = group.rank(), group.size()
        if size > 1:
            key, value = (Gathered.apply(x, group) for x in (key, value))
        places = [positions(r, size, len(query)) for r in range(size)]
        later = torch.cat(places) > places[rank][:, None]
        scores = torch.einsum('sbhd,tbhd->bhst', query, key) / query.shape[-1] ** 0.5
        shares = scores.masked_fill(later, float('-inf')).softmax(-1)
        return torch.einsum('bhst,tbhd->sbhd', shares, value).flatten(2)


def positions(rank: int, size: int, length: int) -> Tensor:
    """Of the tokens that a rank holds, in the whole sequence."""
    half = torch.arange(length // 2)
    return torch.cat([half + chunk * (length // 2) for chunk in (rank, 2 * size - 1 - rank)])


def with_gathered_attention(spec: ModuleSpec) -> ModuleSpec:
    attention = spec.submodules.self_attention
    inner = dataclasses.replace(attention.submodules, core_attention=GatheredAttention)
    outer = dataclasses.replace(
        spec.submodules, self_attention=dataclasses.replace(attention, submodules=inner)
    )
    return dataclasses.replace(spec, submodules=outer)


SPEC = with_gathered_attention(get_gpt_layer_local_spec())
