"""Patch: ``HybridModel.__init__``, to which scripts, builders and ``MambaModel`` come.

Core 0.17 has ``MambaModel`` alone, whose stack spec has another name.

What the model is built of stays Megatron's: its stack spec gets n-stream layers, and the stack that
it built the two ends of the n-stream section.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_mhc.engram.memory import prepare_engram
from megatron_mhc.patches.edge_check import agree_on_edges
from megatron_mhc.patches.engine import Patch
from megatron_mhc.patches.gpt_model import (
    add_topology,
    pipeline_of,
    post_stream_of,
    residual_of,
)
from megatron_mhc.residual.spec import with_residual
from megatron_mhc.settings.flags_engram import engram_of
from megatron_mhc.settings.flags_pipeline import check_recompute_stream
from megatron_mhc.settings.hybrid_stages import main_pattern
from megatron_mhc.settings.model_config import RESIDUAL
from megatron_mhc.settings.refusals import check_residual
from megatron_mhc.settings.refused_pipeline import INVERTED_V
from megatron_mhc.settings.refused_post_stream import POST_STREAM


def stack_spec_name(signature: inspect.Signature) -> str:
    """The parameter of a hybrid model that has its stack spec."""
    return next(name for name in signature.parameters if name.endswith('_stack_spec'))


def _refuse_what_gpt_alone_has(config: Any) -> None:
    """Raise ValueError for a feature that a caller put on the config; flags are checked before."""
    pipeline = pipeline_of(config)
    if pipeline is not None:
        INVERTED_V.check(config, pipeline.schedule)
    if post_stream_of(config) == 'high':
        POST_STREAM.check(config)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    spec_name = stack_spec_name(signature)

    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        config = bound.arguments['config']
        # Configs that did not come from the command line may not say so.
        config.is_hybrid_model = True
        _refuse_what_gpt_alone_has(config)
        residual = residual_of(config)
        if residual.enabled:
            check_residual(config, residual)
            check_recompute_stream(residual.recompute_stream, None)
            bound.arguments[spec_name] = with_residual(bound.arguments[spec_name], residual)
            # The communicator and the optimizer read it from the config they share with the model.
            RESIDUAL.attach(config, residual)
            if not bound.arguments.get('vp_stage'):
                agree_on_edges(config, residual)
        engram = engram_of(config)
        if engram is not None:
            prepare_engram(config, engram, main_pattern(bound.arguments.get))
        original(*bound.args, **bound.kwargs)
        add_topology(self, residual, engram)

    return __init__


HYBRID_MODEL_PATCHES = (
    Patch(
        id='hybrid-model',
        target='megatron.core.models.hybrid.hybrid_model:HybridModel.__init__',
        wrap=_wrap,
        reason='every stack spec of every script passes through it',
        fingerprints={'0.18': '305a7b32', '0.19': '305a7b32', '0.20': '24052d68'},
        reads=('config', 'hybrid_stack_spec', 'vp_stage'),
    ),
    Patch(
        id='mamba-model',
        target='megatron.core.models.mamba.mamba_model:MambaModel.__init__',
        wrap=_wrap,
        reason='the same under the name that 0.17 has for it',
        fingerprints={'0.17': '1803c42e'},
        reads=('config', 'mamba_stack_spec', 'vp_stage'),
    ),
)
