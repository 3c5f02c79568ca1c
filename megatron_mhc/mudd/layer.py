"""A transformer layer whose query, key, value and residual are inputs of their own.

What reaches a layer is its residual way; the three others and all outputs so far travel on that
tensor (``DENSE_WAYS``), so that nothing is kept on a module between two calls. Attention and MLP
are the layer's own. Only two modules of a built layer get another class: the norm before
attention, which then norms three ways, and the projection to queries, keys and values, which then
multiplies each part of its weight with another way.

In a hybrid stack a layer of the paper is a block of layers, ``*-``: what is read, and added up, is
the output of blocks. A block whose mixer is not attention has one input, the residual way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_mhc.mudd.aggregate import DenseAggregate
from megatron_mhc.mudd.sizes import ways_after
from megatron_mhc.residual.attached import DENSE_WAYS, DenseWays
from megatron_mhc.settings.residual import ResidualConfig

if TYPE_CHECKING:

    class _Norm(nn.Module):
        """What ``ThreeWayNorm`` needs of the norm behind it, and what ``connect_densely`` adds."""

        others: tuple[nn.Module, nn.Module]

        def forward(self, x: Tensor) -> Tensor: ...

    class _Linear(nn.Module):
        """The same of ``ThreeWayLinear`` and the projection."""

        weight: nn.Parameter
        bias: nn.Parameter | None
        sequence_parallel: bool
        groups: int
        head_dim: int

    class _Layer(nn.Module):
        """The same of ``MuddLayerMixin`` and the layer."""

        layer_number: int

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Norm = _Linear = _Layer = object


class ThreeWayNorm(_Norm):
    """The norm before attention: ``[s, b, C]`` with what it carries -> ``[s, b, 3C]``."""

    def forward(self, x: Tensor) -> Tensor:
        carried = DENSE_WAYS.peek(x)
        # The first layer reads the embedding every way.
        ways = carried.ways if carried else (x, x, x)
        norms: tuple[Callable[[Tensor], Tensor], ...] = (super().forward, *self.others)
        return torch.cat([norm(way) for norm, way in zip(norms, ways, strict=True)], dim=-1)


class ThreeWayLinear(_Linear):
    """The projection to queries, keys and values: ``[s, b, 3C]`` -> ``[s, b, (q + k + v) / tp]``.

    Its weight keeps Megatron's order, head by head within each query group.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        enter = tensor_parallel.copy_to_tensor_model_parallel_region
        if self.sequence_parallel:
            enter = tensor_parallel.gather_from_sequence_parallel_region
        ways = enter(x).chunk(3, dim=-1)
        parts = self.weight.unflatten(0, (self.groups, -1, self.head_dim))
        biases = self.bias
        if biases is not None:
            biases = biases.unflatten(0, (self.groups, -1, self.head_dim))
        outputs = []
        for way, rows in zip(ways, (slice(0, -2), slice(-2, -1), slice(-1, None)), strict=True):
            bias = None if biases is None else biases[:, rows].flatten()
            y = F.linear(way, parts[:, rows].flatten(0, 2), bias)
            outputs.append(y.unflatten(-1, (self.groups, -1)))
        return torch.cat(outputs, dim=-1).flatten(-2), None


class MuddLayerMixin(_Layer):
    """Overrides the layer's forward, before and after which dense connections stand."""

    # What follows the layer if it ends a block. In a tuple, or it would be registered as a child of
    # the layer too.
    aggregate: tuple[DenseAggregate, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs['hidden_states'] if 'hidden_states' in kwargs else args[0]
        carried = DENSE_WAYS.peek(x)
        if carried is None and self.layer_number > 1:
            raise RuntimeError(
                f'layer {self.layer_number}: the outputs of earlier layers did not arrive with its '
                'input; something between the layers replaced the tensor, which --residual-type '
                'mudd cannot follow'
            )
        history = carried.history if carried else (x,)
        result = super().forward(*args, **kwargs)
        # A Mamba layer returns its output alone.
        output, *rest = result if isinstance(result, tuple) else (result,)
        ways: list[Tensor] = []
        if self.aggregate:
            history = (*history, output)
            *ways, output = self.aggregate[0](history)
        DENSE_WAYS.attach(output, DenseWays(tuple(ways), history))
        return (output, *rest) if isinstance(result, tuple) else output


def _copy_of(norm: nn.Module) -> nn.Module:
    """With parameters of its own, which Megatron's marks come along with."""
    twin = copy.deepcopy(norm)
    for new, old in zip(twin.parameters(), norm.parameters(), strict=True):
        new.__dict__.update(old.__dict__)
    return twin


@functools.cache
def _with(mixin: type, base: type) -> type:
    return type(f'{mixin.__name__}{base.__name__}', (mixin, base), {'__doc__': mixin.__doc__})


def _become(module: nn.Module, mixin: type) -> None:
    base: type = type(module)
    module.__class__ = _with(mixin, base)


def connect_densely(block: TransformerBlock, residual: ResidualConfig) -> None:
    """Give a built block or hybrid stack its aggregates, and attention its three further inputs.

    Raises:
        ValueError: a layer's attention is not one whose inputs can be told apart.
    """
    config = block.config
    symbols = getattr(block, 'layer_type_list', '*' * len(block.layers))
    ways = ways_after(symbols)
    # Children of the block: each has a shape of its own, which layers that are stacked in a
    # checkpoint may not have.
    block.dense_aggregates = nn.ModuleList(
        DenseAggregate(
            config.hidden_size,
            number,
            leaving,
            residual.mudd_variant == 'dynamic',
            config.layernorm_epsilon,
            residual.seed,
            config.sequence_parallel,
        )
        for number, leaving in enumerate(filter(None, ways), 1)
    )
    aggregates = iter(block.dense_aggregates)
    for layer, symbol, leaving in zip(block.layers, symbols, ways, strict=True):
        attention = getattr(layer, 'self_attention', None)
        if symbol == '*' or isinstance(attention, Attention):
            _separate_inputs(layer, attention)
        _become(layer, MuddLayerMixin)
        if leaving:
            layer.aggregate = (next(aggregates),)


def _separate_inputs(layer: Any, attention: Any) -> None:
    """Let the attention of ``layer`` read a way for query, key and value each."""
    linear: Any = getattr(attention, 'linear_qkv', None)
    if type(attention) is not SelfAttention or type(linear) is not ColumnParallelLinear:
        raise ValueError(
            f'--residual-type mudd: layer {layer.layer_number} has {type(attention).__name__} '
            f'with {type(linear).__name__}, whose query, key and value cannot get inputs of '
            'their own; use SelfAttention with --transformer-impl local, in a hybrid model a '
            'stack spec of such layers'
        )
    norm = layer.input_layernorm
    layer.key_layernorm, layer.value_layernorm = _copy_of(norm), _copy_of(norm)
    _become(norm, ThreeWayNorm)
    norm.others = (layer.key_layernorm, layer.value_layernorm)
    _become(linear, ThreeWayLinear)
    linear.groups = attention.num_query_groups_per_partition
    linear.head_dim = attention.hidden_size_per_attention_head
