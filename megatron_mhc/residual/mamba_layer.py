"""n-stream residuals around a Mamba layer, whatever mixer its spec names."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron_mhc.residual.norms import norms_left_out
from megatron_mhc.residual.sublayer import (
    ChainedLayer,
    build_hyper_connection,
    output_projections_rescaled,
    without_residual,
    write,
)

if TYPE_CHECKING:
    from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc.settings.residual import ResidualConfig

    class _Host(nn.Module):
        """What the mixin needs of the layer class behind it."""

        config: TransformerConfig
        layer_number: int

        def __init__(
            self,
            config: TransformerConfig,
            submodules: MambaLayerSubmodules,
            *args: object,
            **kwargs: object,
        ) -> None: ...
else:
    _Host = object


class HyperConnectionMambaLayerMixin(ChainedLayer, _Host):
    """The layer is one sublayer: norm and mixer."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        *args: object,
        residual: ResidualConfig,
        sublayers: int = 1,
        **kwargs: object,
    ) -> None:
        del sublayers
        replaced = {'mamba_bda': without_residual('mamba_bda', submodules.mamba_bda)}
        if residual.norms_streams:
            replaced |= norms_left_out(submodules)
        submodules = dataclasses.replace(submodules, **replaced)
        with output_projections_rescaled(config, residual):
            super().__init__(config, submodules, *args, **kwargs)
        before = self.layer_number - 1
        self.mixer_hyper_connection = build_hyper_connection(config, residual, before)
        self.mixer_hyper_connection.row = 2 * before

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        connection = self.mixer_hyper_connection
        stock = super().forward
        pending, segment, _ = self.run_sublayer(connection, stock, hidden_states, *args, **kwargs)
        return write(pending, segment, connection, *self.following)
