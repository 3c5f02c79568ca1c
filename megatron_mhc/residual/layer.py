"""n-stream residuals around the two sublayers of *any* Megatron transformer layer.

The mixin goes in front of the layer class that a spec names. Norms, attention, MLP, MoE,
recomputation and quantisation inside the two methods that it overrides run unchanged.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    MoETransformerLayer,
    TransformerLayer,
)
from torch import Tensor, nn

from megatron_mhc.kernels.profiler_names import POST_RANGE
from megatron_mhc.residual.hyper_connection import HyperConnection, Pending
from megatron_mhc.residual.norms import norms_left_out
from megatron_mhc.residual.sublayer import (
    ChainedLayer,
    build_hyper_connection,
    n_stream_class,
    output_projections_rescaled,
    without_residual,
    write,
)
from megatron_mhc.settings.residual import ResidualConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from megatron_mhc.residual.post_stream import PostStream

    class _Host(nn.Module):
        """What the mixin needs of the layer class behind it."""

        config: TransformerConfig
        layer_number: int
        self_attention: nn.Module
        mlp: nn.Module
        is_moe_layer: bool

        def __init__(
            self,
            config: TransformerConfig,
            submodules: TransformerLayerSubmodules,
            *args: object,
            **kwargs: object,
        ) -> None: ...

        def _get_submodules_under_cudagraphs(self) -> list[nn.Module]: ...

        def _forward_attention(
            self, hidden_states: Tensor, *args: object, **kwargs: object
        ) -> tuple[Any, ...]: ...

        def _forward_mlp(
            self, hidden_states: Tensor, *args: object, **kwargs: object
        ) -> Tensor: ...
else:
    _Host = object


class HyperConnectionLayerMixin(ChainedLayer, _Host):
    """Overrides the two sublayer methods; everything else is the layer class behind it."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: object,
        residual: ResidualConfig,
        sublayers: int = 2,
        **kwargs: object,
    ) -> None:
        """``sublayers``: how many each layer of the model has, counting those left out."""
        cross_attention = submodules.cross_attention
        if getattr(cross_attention, 'module', cross_attention) not in (IdentityOp, IdentityFuncOp):
            raise ValueError(
                f'--residual-type {residual.residual_type}: this layer has cross attention '
                f'({cross_attention}), for which hyper-connections are not defined; '
                'use --residual-type standard for encoder-decoder models'
            )
        replaced = {
            name: without_residual(name, getattr(submodules, name))
            for name in ('self_attn_bda', 'mlp_bda')
        }
        if residual.norms_streams:
            replaced |= norms_left_out(submodules)
        with output_projections_rescaled(config, residual):
            super().__init__(config, dataclasses.replace(submodules, **replaced), *args, **kwargs)

        def connection(sublayer: nn.Module, place: int) -> HyperConnection | None:
            if isinstance(sublayer, IdentityOp):
                if residual.residual_type == 'attention' and sublayers == 2:
                    raise ValueError(
                        f'--residual-type attention: layer {self.layer_number} has no '
                        f'{("attention", "MLP")[place]}, and blocks count both of every layer; use '
                        'layers with both, a hybrid model, or --residual-type mhc'
                    )
                return None
            before = self.layer_number - 1
            number = before if sublayers == 1 else 2 * before + place
            built = build_hyper_connection(config, residual, number)
            built.row = 2 * before + place
            return built

        self.self_attention_hyper_connection = connection(self.self_attention, 0)
        self.mlp_hyper_connection = connection(self.mlp, 1)
        # A ``PostStream``: where the MLP's F_post,res runs if not on the current stream.
        self.post_stream: PostStream | None = None

    def _get_submodules_under_cudagraphs(self) -> list[nn.Module]:
        """With the connections of the sublayers: a replay runs no hook that gathers parameters."""
        captured: list[nn.Module] = super()._get_submodules_under_cudagraphs()
        pairs = (
            (self.self_attention, self.self_attention_hyper_connection),
            (self.mlp, self.mlp_hyper_connection),
        )
        inside = [c for sublayer, c in pairs if c and any(m is sublayer for m in captured)]
        return [*captured, *inside]

    def _forward_attention(
        self, hidden_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Any, ...]:
        connection = self.self_attention_hyper_connection
        if connection is None:
            return super()._forward_attention(hidden_states, *args, **kwargs)
        stock = super()._forward_attention
        pending, segment, rest = self.run_sublayer(
            connection, stock, hidden_states, *args, **kwargs
        )
        inside = self.mlp_hyper_connection
        following = self.following if inside is None else (inside,)
        return write(pending, segment, connection, *following), *rest

    def _forward_mlp(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        connection = self.mlp_hyper_connection
        if connection is None:
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        stock = super()._forward_mlp
        pending, segment, _ = self.run_sublayer(connection, stock, hidden_states, *args, **kwargs)
        if self.post_stream is None or not self.training:
            with torch.profiler.record_function(POST_RANGE):
                return write(pending, segment, connection, *self.following)
        y, carried, bias, dropout, _ = pending
        return self.post_stream.run(
            lambda y, bias, carried: write(Pending(y, carried, bias, dropout), segment, connection),
            *(y, bias, carried),
            hands_over=not self.is_moe_layer,
        )


class HyperConnectionTransformerLayer(HyperConnectionLayerMixin, TransformerLayer):
    """``TransformerLayer`` with n-stream residuals."""


class HyperConnectionMoETransformerLayer(HyperConnectionLayerMixin, MoETransformerLayer):
    """``MoETransformerLayer`` with n-stream residuals."""


_STATIC = {
    TransformerLayer: HyperConnectionTransformerLayer,
    MoETransformerLayer: HyperConnectionMoETransformerLayer,
}


def hyper_connection_layer(layer_class: type) -> type:
    """The n-stream form of ``layer_class``; an n-stream class is returned as it is."""
    if issubclass(layer_class, HyperConnectionLayerMixin):
        return layer_class
    if layer_class in _STATIC:
        return _STATIC[layer_class]
    missing = [
        name for name in ('_forward_attention', '_forward_mlp') if not hasattr(layer_class, name)
    ]
    if not issubclass(layer_class, BaseTransformerLayer) or missing:
        raise ValueError(
            f'layer class {layer_class.__module__}.{layer_class.__qualname__} has no '
            f'{" or ".join(missing) or "BaseTransformerLayer base"}: hyper-connections wrap those '
            'two methods of a TransformerLayer; derive the layer from TransformerLayer'
        )
    # mypy does not know that every class can be hashed.
    return n_stream_class(HyperConnectionLayerMixin, layer_class)  # type: ignore[arg-type]
