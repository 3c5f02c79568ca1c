"""Patch: ``HybridModel.__init__``, to which scripts, builders and ``MambaModel`` come.

Core 0.17 has ``MambaModel`` alone, whose stack spec has another name.

What the model is built of stays Megatron's: its stack spec gets n-stream layers, and the stack that
it built the two ends of the n-stream section.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_mhc.compat import core_version
from megatron_mhc.engram.memory import prepare_engram
from megatron_mhc.patches.combined_passes import require_lanes
from megatron_mhc.patches.edge_check import agree_on_edges
from megatron_mhc.patches.engine import Patch, applied
from megatron_mhc.patches.gpt_model import (
    add_topology,
    drawn_as_planned,
    move_post_stream,
    pipeline_of,
    prepare_pipeline,
    residual_of,
)
from megatron_mhc.patches.inverted_v import PATTERN_PATCHES
from megatron_mhc.pipeline.edges import is_stock
from megatron_mhc.pipeline.tied_embedding import tie
from megatron_mhc.residual.spec import with_residual
from megatron_mhc.settings.flags_engram import engram_of
from megatron_mhc.settings.flags_pipeline import check_recompute_stream
from megatron_mhc.settings.hybrid_stages import main_pattern
from megatron_mhc.settings.model_config import RESIDUAL
from megatron_mhc.settings.pipeline import PipelineConfig
from megatron_mhc.settings.refusals import check_residual


def stack_spec_name(signature: inspect.Signature) -> str:
    """The parameter of a hybrid model that has its stack spec."""
    return next(name for name in signature.parameters if name.endswith('_stack_spec'))


def _require_placement(pipeline: PipelineConfig) -> None:
    if not PATTERN_PATCHES.intersection(applied()):
        raise RuntimeError(
            f'--pipeline-schedule {pipeline.schedule} with --hybrid-layer-pattern: no patch that '
            f'gives a stage the layers of a V is in place for megatron-core {core_version()} '
            '(`megatron-mhc doctor` lists them); use --pipeline-schedule 1f1b'
        )


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    spec_name = stack_spec_name(signature)

    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        config, vp_stage = bound.arguments['config'], bound.arguments.get('vp_stage')
        # Configs that did not come from the command line may not say so.
        config.is_hybrid_model = True
        residual = residual_of(config)
        if residual.enabled:
            check_residual(config, residual)
            bound.arguments[spec_name] = with_residual(bound.arguments[spec_name], residual)
            # The communicator and the optimizer read it from the config they share with the model.
            RESIDUAL.attach(config, residual)
        engram = engram_of(config)
        if engram is not None:
            prepare_engram(config, engram, main_pattern(bound.arguments.get))
        if not is_stock(config):
            require_lanes(config)
            if not vp_stage:
                agree_on_edges(config)
        pipeline = pipeline_of(config)
        check_recompute_stream(residual.recompute_stream, pipeline)
        if pipeline is not None:
            if pipeline.on_v:
                _require_placement(pipeline)
            prepare_pipeline(config, pipeline, bound.arguments)
        with drawn_as_planned(pipeline, vp_stage):
            original(*bound.args, **bound.kwargs)
        add_topology(self, residual, engram)
        if pipeline is not None and pipeline.on_v:
            # On a V one rank holds all copies of the word embedding.
            tie(self)
        move_post_stream(self)

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
