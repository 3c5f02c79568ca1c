"""Turn a layer spec or block spec into its n-stream form, whatever built it."""

from __future__ import annotations

import dataclasses

from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_mhc.residual.layer import hyper_connection_layer
from megatron_mhc.residual.mamba_layer import HyperConnectionMambaLayerMixin
from megatron_mhc.residual.stack import HyperConnectionStackMixin, is_stack
from megatron_mhc.residual.sublayer import n_stream_class
from megatron_mhc.settings.residual import ResidualConfig

type Spec = ModuleSpec | TransformerBlockSubmodules


def with_residual(spec: Spec, residual: ResidualConfig, sublayers: int = 2) -> Spec:
    """The n-stream form of ``spec``; the argument is left as it was.

    Args:
        spec: a ``ModuleSpec`` of any ``TransformerLayer`` (local or TE, dense or MoE, MLA), a
            ``TransformerBlockSubmodules``, or a ``ModuleSpec`` of a block or of a hybrid stack.
        residual: the settings. Without connections of sublayers the spec itself is
            returned.
        sublayers: of each layer of the model; 1 in a hybrid stack.

    Raises:
        ValueError: the spec names no transformer layer.
    """
    if not residual.wraps_sublayers:
        return spec
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [with_residual(layer, residual) for layer in spec.layer_specs or ()]
        return dataclasses.replace(spec, layer_specs=layers)
    if not isinstance(spec, ModuleSpec) or not isinstance(spec.module, type):
        raise ValueError(
            f'layer spec of type {type(spec).__name__}: wanted a ModuleSpec of a transformer layer '
            'or block, or TransformerBlockSubmodules'
        )
    if issubclass(spec.module, TransformerBlock):
        return dataclasses.replace(spec, submodules=with_residual(spec.submodules, residual))
    if is_stack(spec):
        params = {**spec.params, 'residual': residual}
        widened = n_stream_class(HyperConnectionStackMixin, spec.module)
        return dataclasses.replace(spec, module=widened, params=params)
    if issubclass(spec.module, MambaLayer):
        widened = n_stream_class(HyperConnectionMambaLayerMixin, spec.module)
    else:
        widened = hyper_connection_layer(spec.module)
    return dataclasses.replace(
        spec,
        module=widened,
        params={**spec.params, 'residual': residual, 'sublayers': sublayers},
        # The stock layer rewrites its submodules in place; specs are often shared between layers.
        submodules=dataclasses.replace(spec.submodules),
    )
