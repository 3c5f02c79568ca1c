"""Seam: ``GPTModel.__init__``, the one place through which every spec of every release passes.

Scripts, builders and ``--spec`` differ between releases; all end here. A class attribute is
wrapped, so that it does not matter which module imported the class when.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_mhc.arguments import parsed_arguments, residual_config_from_args
from megatron_mhc.block import widen_block
from megatron_mhc.config import ResidualConfig
from megatron_mhc.constraints import check_constraints
from megatron_mhc.patches.edge_check import agree_on_edges
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.p2p import negotiate_shapes_if_needed
from megatron_mhc.spec import with_residual


def residual_of(config: Any) -> ResidualConfig:
    """``config.residual_config`` where a caller set it, else what the command line asked for."""
    residual = getattr(config, 'residual_config', None)
    if residual is not None:
        return residual
    args = parsed_arguments()
    return ResidualConfig('standard') if args is None else residual_config_from_args(args)


def _wrap(original: Callable) -> Callable:
    signature = inspect.signature(original)

    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        config = bound.arguments['config']
        residual = residual_of(config)
        if residual.enabled:
            check_constraints(config, residual)
            bound.arguments['transformer_layer_spec'] = with_residual(
                bound.arguments['transformer_layer_spec'], residual
            )
            # The communicator and the optimizer read it from the config they share with the model.
            config.residual_config = residual
            negotiate_shapes_if_needed(config)
        original(*bound.args, **bound.kwargs)
        if residual.enabled:
            widen_block(self.decoder, residual)
            agree_on_edges(config, residual)

    return __init__


GPT_MODEL_PATCH = Patch(
    id='gpt-model',
    target='megatron.core.models.gpt.gpt_model:GPTModel.__init__',
    wrap=_wrap,
    reason='every layer spec of every script and release passes through it',
    fingerprints=on_every_release('97819a84'),
)
