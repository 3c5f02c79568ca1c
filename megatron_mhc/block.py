"""The ends of the n-stream section: expand at the block's input, merge before its final norm."""

from __future__ import annotations

import functools

from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import WrappedTensor, get_pg_rank
from torch import Tensor, nn

from megatron_mhc.config import ResidualConfig
from megatron_mhc.stream_merge import StreamMerge, expand_streams


class HyperConnectionBlockMixin:
    """A block whose layers carry n streams; given to a built block by ``widen_block``."""

    def forward(self, hidden_states: Tensor | WrappedTensor, *args: object, **kwargs: object):
        if self.pre_process:
            if isinstance(hidden_states, WrappedTensor):
                hidden_states = hidden_states.unwrap()
            hidden_states = expand_streams(hidden_states, self.num_streams)
        elif self.input_tensor is not None:
            self._check_width(self.input_tensor)
        if kwargs.get('extract_layer_indices'):
            raise ValueError(
                'extract_layer_indices: intermediate hidden states are n streams wide under '
                'hyper-connections; use --residual-type standard to extract features'
            )
        return super().forward(hidden_states, *args, **kwargs)

    def _check_width(self, x: Tensor) -> None:
        hidden_size = self.config.hidden_size
        if x.shape[-1] != self.num_streams * hidden_size:
            raise RuntimeError(
                f'pipeline stage received hidden states of width {x.shape[-1]}, wanted '
                f'{self.num_streams} streams * {hidden_size}: the previous stage runs with another '
                '--residual-type or stream count; start every rank with the same command'
            )


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
    block.__class__ = hyper_connection_block(type(block))
    block.num_streams = 1 if lies_behind_final_norm(block) else residual.num_residual_streams
    if block.final_layernorm is not None:
        block.stream_merge = StreamMerge(
            block.config.hidden_size, residual, block.config.sequence_parallel
        )
        block.final_layernorm.register_forward_pre_hook(functools.partial(_merge_first, block))
    elif block.post_process and not block.config.mtp_num_layers:
        raise ValueError(
            'the last pipeline stage has no final norm, before which the residual streams are '
            'merged: build the block with post_layer_norm=True or use --residual-type standard'
        )


def lies_behind_final_norm(block: TransformerBlock) -> bool:
    """Whether an earlier stage merged the streams already.

    With multi-token prediction the final norm follows the last decoder layer, which may leave the
    last stages to the prediction layers and the loss.
    """
    if not block.config.mtp_num_layers or block.pre_process or len(block.layers):
        return False
    before = get_transformer_layer_offset(
        block.config, block.vp_stage, get_pg_rank(block.pg_collection.pp)
    )
    return before >= block.config.num_layers


def _merge_first(block: TransformerBlock, norm: nn.Module, inputs: tuple) -> tuple:
    del norm
    return (block.stream_merge(inputs[0]), *inputs[1:])
