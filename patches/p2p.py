"""Seam: ``P2PCommunicator._communicate``, which serves both stock pipeline schedules.

Both schedules size their messages by ``config.hidden_size``, the interleaved one inline. Stages
exchange n streams, so a fixed shape is widened here. Neither end checks shapes in stock Megatron: a
receiver of the wrong width silently reads a part of the message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.patches.engine import Patch


def _wrap(original: Callable) -> Callable:
    def _communicate(self, *, tensor_shape, **kwargs):
        residual = getattr(self.config, 'residual_config', None)
        if residual is None or not residual.enabled or shapes_are_negotiated(self.config):
            return original(self, tensor_shape=tensor_shape, **kwargs)
        streams, hidden_size = residual.num_residual_streams, self.config.hidden_size
        for name in ('tensor_send_next', 'tensor_send_prev'):
            tensor = kwargs.get(name)
            if tensor is not None and tensor.shape[-1] != streams * hidden_size:
                raise RuntimeError(
                    f'pipeline edge: {name} has shape {list(tensor.shape)}, but the edge carries '
                    f'{streams} streams of {hidden_size}; a module between the stages changed the '
                    'width of the hidden states'
                )
        if tensor_shape is not None and len(tensor_shape) == 3:
            tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] * streams)
        return original(self, tensor_shape=tensor_shape, **kwargs)

    return _communicate


def shapes_are_negotiated(config: Any) -> bool:
    """Whether the communicator exchanges shapes before each message and needs no width from us."""
    return bool(config.variable_seq_lengths or getattr(config, 'mtp_standalone', False))


def negotiate_shapes_if_needed(config: Any) -> None:
    """Let the stages exchange shapes where some edges lie behind the final norm and are C wide.

    That happens with multi-token prediction when the last stage has no decoder layer. Every rank
    reads it from the same layout.
    """
    layout = getattr(config, 'pipeline_model_parallel_layout', None)
    if not config.mtp_num_layers or layout is None or shapes_are_negotiated(config):
        return
    last_stage = layout.layout[-1][-1]
    if not any(layer.name == 'decoder' for layer in last_stage):
        config.variable_seq_lengths = True


P2P_PATCH = Patch(
    id='p2p',
    target='megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate',
    wrap=_wrap,
    reason='one method serves both schedules; the interleaved one computes its shape inline',
    fingerprints=dict.fromkeys(('0.17', '0.18', '0.19'), 'e01cfa8f'),
)
