"""Patch: ``P2PCommunicator._communicate``, which serves both stock pipeline schedules.

Both schedules size their messages by ``config.hidden_size``, the interleaved one inline. Stages
exchange n streams, so a fixed shape is widened here. Neither end checks shapes in stock Megatron: a
receiver of the wrong width silently reads a part of the message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.pipeline.edges import (
    describe_edge,
    edge_width,
    is_stock,
    shapes_are_negotiated,
)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def _communicate(self, *, tensor_shape, **kwargs):
        if is_stock(self.config) or shapes_are_negotiated(self.config):
            return original(self, tensor_shape=tensor_shape, **kwargs)
        width = edge_width(self.config)
        for name in ('tensor_send_next', 'tensor_send_prev'):
            tensor = kwargs.get(name)
            if tensor is not None and tensor.shape[-1] != width:
                raise RuntimeError(
                    f'pipeline edge: {name} has shape {list(tensor.shape)}, but the edge carries '
                    f'{describe_edge(self.config)}; a module between the stages changed '
                    'the width of the hidden states'
                )
        if tensor_shape is not None and len(tensor_shape) == 3:
            tensor_shape = (*tensor_shape[:-1], width)
        return original(self, tensor_shape=tensor_shape, **kwargs)

    return _communicate


def negotiate_shapes_if_needed(config: Any) -> None:
    """Let the stages exchange shapes where some edges lie behind the final norm and are C wide.

    That happens with multi-token prediction when the last stage has no decoder layer. Every rank
    reads it from the same config.
    """
    stages, virtual = (
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
    )
    if not config.mtp_num_layers or stages < 2 or shapes_are_negotiated(config):
        return
    layout = getattr(config, 'pipeline_model_parallel_layout', None)
    if layout is not None:
        # Not through get_num_layers_to_build, which answers for the calling rank's stage here.
        layers = sum(layer.name == 'decoder' for layer in layout.layout[-1][-1])
    else:
        last_chunk = virtual - 1 if virtual else None
        layers = get_num_layers_to_build(config, vp_stage=last_chunk, pp_rank=stages - 1)
    config.variable_seq_lengths = layers == 0


def check_ring_of_two(config: Any) -> None:
    """Raise ValueError where stock schedules would pair the shapes of two messages wrongly.

    With virtual stages both neighbours of one of two ranks are the other one, and shapes of both
    directions are exchanged in one batch unless p2p overlaps.
    """
    ring = config.pipeline_model_parallel_size == 2 and config.virtual_pipeline_model_parallel_size
    if ring and config.mtp_num_layers and shapes_are_negotiated(config):
        if not config.overlap_p2p_comm:
            raise ValueError(
                'overlap_p2p_comm=False with 2 pipeline ranks, virtual stages and prediction '
                'layers in front of the last stage: the shapes of the two messages between the '
                'ranks are paired the wrong way round; leave p2p overlap on, or put a decoder '
                'layer on the last stage'
            )


P2P_PATCH = Patch(
    id='p2p',
    target='megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate',
    wrap=_wrap,
    reason='one method serves both schedules; the interleaved one computes its shape inline',
    fingerprints=on_every_release('e01cfa8f'),
    reads=('tensor_shape', 'tensor_send_next', 'tensor_send_prev'),
)
