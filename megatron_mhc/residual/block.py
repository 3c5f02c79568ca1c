"""The ends of the n-stream section: expand at the block's input, merge before its final norm."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import WrappedTensor
from torch import Tensor, nn

from megatron_mhc.residual import single_pass
from megatron_mhc.residual.attention import (
    AttentionMerge,
    block_sums_of,
    message,
    sublayers_of,
)
from megatron_mhc.residual.gated import GatedMerge
from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.residual.norms import leave_out_final_norm
from megatron_mhc.residual.recompute_choice import choose_segment_size
from megatron_mhc.residual.stream_merge import StreamMerge, expand_streams
from megatron_mhc.residual.sublayer import ChainedLayer
from megatron_mhc.settings.residual import ResidualConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    class _Host(nn.Module):
        """What the mixin needs of the block class behind it, and what ``widen_block`` adds."""

        config: TransformerConfig
        pre_process: bool
        num_streams: int
        single_pass: bool
        block_sums: int
        layers: nn.ModuleList
else:
    _Host = object


class HyperConnectionBlockMixin(_Host):
    """A block whose layers carry n streams; given to a built block by ``widen_block``."""

    def forward(
        self, hidden_states: Tensor | WrappedTensor, *args: object, **kwargs: object
    ) -> Any:
        inference = kwargs.get('inference_context') or kwargs.get('inference_params')
        if inference is not None and self.config.pipeline_model_parallel_size > 1:
            raise NotImplementedError(
                'inference with --pipeline-model-parallel-size > 1: its receive buffers are one '
                'stream wide; run inference on one pipeline stage'
            )
        if kwargs.get('extract_layer_indices'):
            raise NotImplementedError(
                'extract_layer_indices: intermediate hidden states are n streams wide under '
                'hyper-connections; use --residual-type standard to extract features'
            )
        if self.pre_process:
            if isinstance(hidden_states, WrappedTensor):
                hidden_states = hidden_states.unwrap()
            hidden_states = expand_streams(hidden_states, self.num_streams)
            if self.config.recompute_granularity and torch.is_grad_enabled():
                # Those of a frozen embedding do not, and what Megatron recomputes from inputs
                # without a gradient gets none.
                hidden_states.requires_grad_()
            if self.single_pass:
                alone = not self.layers or (_recomputes(self.config) and self.training)
                hidden_states = single_pass.start(hidden_states, self.num_streams, alone)
            if self.block_sums and not self.layers:
                # Of what leaves a stage without layers.
                hidden_states = message((hidden_states,), self.block_sums)
        return super().forward(hidden_states, *args, **kwargs)


@functools.cache
def hyper_connection_block(block_class: type) -> type:
    name = f'HyperConnection{block_class.__name__}'
    return type(name, (HyperConnectionBlockMixin, block_class), {'__doc__': block_class.__doc__})


def widen_block(block: TransformerBlock, residual: ResidualConfig) -> None:
    """Make a built block expand its input to n streams and merge them before its final norm.

    The class is exchanged in place because ``GPTModel`` names the block class itself. The merge is
    a child of the block (checkpoints collect those) and runs as a pre-hook of the final norm, so
    that the norm keeps its parameter names.
    """
    block_class: type = type(block)
    block.__class__ = hyper_connection_block(block_class)
    block.num_streams = residual.streams
    block.single_pass = residual.single_pass
    block.block_sums = block_sums_of(block.config, residual)
    size = choose_segment_size(block, residual)
    for layer in block.layers:
        layer.recompute_segment_size = size
    for layer, following in itertools.pairwise(block.layers):
        if isinstance(layer, ChainedLayer):
            layer.precedes(following)
    mark_ends(block)
    norm = final_norm_of(block)
    if norm is not None:
        block.stream_merge = _merge_of(block.config, residual)
        if residual.norms_streams:
            norm = leave_out_final_norm(block)
        norm.register_forward_pre_hook(functools.partial(_merge_first, block))
    elif block.post_process and not block.config.mtp_num_layers:
        raise ValueError(
            'the last pipeline stage has no final norm, before which the residual streams are '
            'merged: build the block with post_layer_norm=True or use --residual-type standard'
        )


def _merge_of(config: TransformerConfig, residual: ResidualConfig) -> nn.Module:
    common = config.hidden_size, residual, config.sequence_parallel, config.layernorm_epsilon
    if residual.residual_type == 'gated':
        return GatedMerge(*common, config.init_method_std)
    if residual.residual_type == 'attention':
        return AttentionMerge(*common[:2], sublayers_of(config), *common[2:])
    return StreamMerge(*common)


def mark_ends(block: TransformerBlock) -> None:
    """Tell each sublayer whether what it writes leaves the stage, or layers recomputed as one."""
    last: HyperConnection | None = None
    for number, layer in enumerate(block.layers, start=1):
        own = [child for child in layer.children() if isinstance(child, HyperConnection)]
        last = own[-1] if own else last
        if last is not None:
            last.ends_checkpoint |= _recomputes(block.config) and _ends_checkpoint(block, number)
    if last is not None:
        last.ends_stage = final_norm_of(block) is None


def _recomputes(config: TransformerConfig) -> bool:
    return bool(config.recompute_granularity == 'full')


def _ends_checkpoint(block: TransformerBlock, number: int) -> bool:
    """Whether Megatron recomputes layer ``number`` of a stage, from 1, without the one after it."""
    config, size = block.config, block.config.recompute_num_layers
    if config.recompute_method == 'uniform':
        return bool(number % size == 0 or number == len(block.layers))
    # Under fp8 and fp4 it passes over layers whose input has no gradient, and takes others.
    return bool(number <= size or config.fp8 or getattr(config, 'fp4', None))


def final_norm_of(block: nn.Module) -> nn.Module | None:
    """The final norm of a block or of a hybrid stack, which has none on other stages."""
    norm: nn.Module | None = getattr(block, 'final_norm', None)
    return norm or getattr(block, 'final_layernorm', None)


def _merge_first(
    block: TransformerBlock, norm: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    del norm
    return (block.stream_merge(inputs[0]), *inputs[1:])
