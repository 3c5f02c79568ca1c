"""The size of a recompute segment for one model chunk, and the line at start that says so."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.residual.stack import HyperConnectionStackMixin
from megatron_mhc.settings.recompute_cost import kept_cost, segment_cost, segment_size, whole_cost
from megatron_mhc.settings.residual import ResidualConfig


def choose_segment_size(block: TransformerBlock, residual: ResidualConfig) -> int:
    """Sublayers in a recompute segment of this chunk, 0 for no recomputation; says so once."""
    wanted, n = residual.recompute_layer_num, residual.num_residual_streams
    if wanted == 'none':
        return 0
    sublayers = sum(isinstance(module, HyperConnection) for module in block.modules())
    each = 1 if isinstance(block, HyperConnectionStackMixin) else 2
    # Other stages may have other numbers of layers; layers of one sublayer have no such table.
    stages = {sublayers}
    if sublayers == 2 * len(block.layers):
        stages |= {2 * layers for layers in _layers_of_stages(block.config) if layers}
    sizes, choices = {}, []
    for stage in sorted(stages, reverse=True):
        alive = _alive_at_once(block.config, stage, each)
        size = sizes[stage] = segment_size(wanted, n, alive)
        if not stage:
            continue
        choices.append(
            f'L_r = {size} for {alive} sublayers of a stage (kept {kept_cost(n, alive, size)}C, at '
            f'most {segment_cost(n, alive, size)}C, without {whole_cost(n, alive)}C values a token)'
        )
    announce(f'--mhc-recompute-layer-num {wanted}, by formula: {"; ".join(choices)}')
    return sizes[sublayers]


def _layers_of_stages(config: Any) -> set[int]:
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return {stage.count(LayerType.decoder) for rank in layout.layout for stage in rank}
    chunks = range(config.virtual_pipeline_model_parallel_size or 0)
    return {
        get_num_layers_to_build(config, chunk, rank)
        for rank in range(config.pipeline_model_parallel_size)
        for chunk in (chunks or (None,))
    }


def _alive_at_once(config: Any, sublayers: int, each: int) -> int:
    """Sublayers whose graph exists at one time: under full recomputation, those of a checkpoint.

    ``each``: sublayers of a layer.
    """
    if config.recompute_granularity != 'full':
        return sublayers
    recomputed: int = each * config.recompute_num_layers
    if config.recompute_method == 'block' and recomputed < sublayers:
        # Layers of their own first; the others are not recomputed as a whole.
        return sublayers - recomputed
    return min(sublayers, recomputed if config.recompute_method == 'uniform' else each)
