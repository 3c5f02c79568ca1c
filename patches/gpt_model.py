"""Patch: ``GPTModel.__init__``, the one place through which every spec of every release passes.

Scripts, builders and ``--spec`` differ between releases; all end here. A class attribute is
wrapped, so that it does not matter which module imported the class when.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import is_te_min_version

from megatron_mhc.engram.memory import attach, prepare_engram
from megatron_mhc.mudd.layer import connect_densely
from megatron_mhc.patches.combined_passes import require_lanes
from megatron_mhc.patches.edge_check import agree_on_edges
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.p2p import check_ring_of_two, negotiate_shapes_if_needed
from megatron_mhc.pipeline.edges import is_stock
from megatron_mhc.pipeline.embedding_copies import check_embedding_group, one_rank_holds_all
from megatron_mhc.pipeline.initial_weights import drawn_as_on_a_line
from megatron_mhc.pipeline.mirrored_copies import drawn_as_copies, mark_copy
from megatron_mhc.pipeline.tied_embedding import drop_unused_output_weight, tie
from megatron_mhc.residual.block import widen_block
from megatron_mhc.residual.post_stream import use_post_stream
from megatron_mhc.residual.spec import with_residual
from megatron_mhc.schedules import mirrored
from megatron_mhc.schedules.inverted_v import CHUNKS, stage_of
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.flags_engram import engram_of
from megatron_mhc.settings.flags_pipeline import check_recompute_stream, pipeline_config_from_args
from megatron_mhc.settings.flags_residual import parsed_arguments, residual_config_from_args
from megatron_mhc.settings.model_config import PIPELINE, POST_STREAM, RESIDUAL
from megatron_mhc.settings.pipeline import PipelineConfig
from megatron_mhc.settings.refusals import check_residual
from megatron_mhc.settings.refused_pipeline import check_planned
from megatron_mhc.settings.residual import ResidualConfig


def residual_of(config: Any) -> ResidualConfig:
    """``config.residual_config`` where a caller set it, else what the command line asked for."""
    residual = RESIDUAL.peek(config)
    if residual is not None:
        return residual
    args = parsed_arguments()
    return ResidualConfig('standard') if args is None else residual_config_from_args(args)


def pipeline_of(config: Any) -> PipelineConfig | None:
    """``config.pipeline_config`` where a caller set it, else what the command line asked for."""
    pipeline = PIPELINE.peek(config)
    if pipeline is None and (args := parsed_arguments()) is not None:
        pipeline = pipeline_config_from_args(args)
    return pipeline


def move_post_stream(model: Any) -> None:
    """Put F_post,res of a built model where its config says, or else ``--mhc-post-stream``."""
    own = POST_STREAM.peek(model.config)
    post_stream = own or getattr(parsed_arguments(), 'mhc_post_stream', None) or 'compute'
    POST_STREAM.attach(model.config, post_stream)
    if post_stream == 'high':
        use_post_stream(model)


def prepare_pipeline(config: Any, pipeline: PipelineConfig, arguments: dict[str, Any]) -> None:
    """Make a model fit its schedule.

    Args:
        config: the model's; ``check_planned`` refuses what it cannot have.
        pipeline: the schedule.
        arguments: what the model is called with. Of two chunks ``pre_process`` and ``post_process``
            are set: builders may have asked for the ends by other names than the patched ones.
    """
    vp_stage = arguments.get('vp_stage')
    if pipeline.two_chunks and vp_stage is None:
        raise ValueError(
            f'--pipeline-schedule {pipeline.schedule}: the model was built without vp_stage, so '
            'which of its two chunks this is cannot be told; the model provider must pass it on'
        )
    if not pipeline.two_chunks and vp_stage is not None:
        raise ValueError(
            f'--pipeline-schedule {pipeline.schedule}: the model was built with virtual stages, '
            'and this schedule has one chunk a rank; build it without, or use zb-v'
        )
    if not vp_stage:
        # The second chunk shares the config, in which the next lines set what nobody else may.
        check_planned(config, pipeline)
    PIPELINE.attach(config, pipeline)
    # Set here because the check in the config demands Megatron's own overlap with it.
    config.delay_wgrad_compute = is_te_min_version('2.3.0')
    if vp_stage is not None:
        ranks = config.pipeline_model_parallel_size
        rank = parallel_state.get_pipeline_model_parallel_rank()
        if pipeline.mirrored:
            stage, last = mirrored.stage_of(rank, vp_stage, ranks), ranks - 1
        else:
            stage, last = stage_of(rank, vp_stage, ranks), CHUNKS * ranks - 1
        arguments |= {'pre_process': stage == 0, 'post_process': stage == last}


def drawn_as_planned(
    pipeline: PipelineConfig | None, vp_stage: int | None
) -> contextlib.AbstractContextManager[None]:
    """Where a chunk is built: with the random numbers of 1F1B, whichever rank it is on."""
    if pipeline is None or not pipeline.two_chunks or vp_stage is None:
        return contextlib.nullcontext()
    drawn = drawn_as_copies if pipeline.mirrored else drawn_as_on_a_line
    return drawn(parallel_state.get_pipeline_model_parallel_group(), vp_stage)


def prepare_embeddings(
    config: Any, arguments: dict[str, Any], pipeline: PipelineConfig | None
) -> bool:
    """Check the copies of the word embedding; returns whether this model has them on one rank.

    Args:
        config: the model's.
        arguments: what GPTModel is called with.
        pipeline: settings of a schedule that is run from a plan.
    """
    tied = arguments.get('share_embeddings_and_output_weights', False)
    if pipeline is not None and pipeline.mirrored:
        # Each end has both stages that hold one, of different copies.
        return bool(tied)
    layout = getattr(config, 'pipeline_model_parallel_layout', None)
    on_v = pipeline is not None and pipeline.on_v
    together = one_rank_holds_all(layout, tied, inverted_v=on_v)
    group = parallel_state.get_embedding_group(check_initialized=False)
    groups = arguments.get('pg_collection')
    usual = groups is None or getattr(groups, 'embd', None) is group
    if config.mtp_num_layers and usual and parallel_state.is_initialized():
        rank = parallel_state.get_pipeline_model_parallel_rank()
        check_embedding_group(layout, tied, rank, is_member=group is not None)
    return together


def add_topology(model: Any, residual: ResidualConfig, engram: EngramConfig | None) -> None:
    """Give a built model, GPT or hybrid, its residual topology and its memory."""
    if residual.residual_type == 'mudd':
        connect_densely(model.decoder, residual)
    elif residual.enabled:
        widen_block(model.decoder, residual)
    if engram is not None:
        attach(model, engram, residual.streams)
    drop_unused_output_weight(model)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        config = bound.arguments['config']
        residual = residual_of(config)
        if residual.enabled:
            check_residual(config, residual)
            bound.arguments['transformer_layer_spec'] = with_residual(
                bound.arguments['transformer_layer_spec'], residual
            )
            # The communicator and the optimizer read it from the config they share with the model.
            RESIDUAL.attach(config, residual)
        engram = engram_of(config)
        if engram is not None:
            prepare_engram(config, engram)
        if not is_stock(config):
            negotiate_shapes_if_needed(config)
            require_lanes(config)
            # Ahead of every chunk: tied embeddings are reduced across stages while they are built.
            if not bound.arguments.get('vp_stage'):
                agree_on_edges(config)
        pipeline = pipeline_of(config)
        check_recompute_stream(residual.recompute_stream, pipeline)
        if pipeline is not None:
            prepare_pipeline(config, pipeline, bound.arguments)
        else:
            check_ring_of_two(config)
        together = prepare_embeddings(config, bound.arguments, pipeline)
        with drawn_as_planned(pipeline, bound.arguments.get('vp_stage')):
            original(*bound.args, **bound.kwargs)
        add_topology(self, residual, engram)
        if together:
            tie(self)
        if pipeline is not None and pipeline.mirrored:
            group = parallel_state.get_pipeline_model_parallel_group()
            mark_copy(self, group, bound.arguments['vp_stage'])
        move_post_stream(self)

    return __init__


GPT_MODEL_PATCH = Patch(
    id='gpt-model',
    target='megatron.core.models.gpt.gpt_model:GPTModel.__init__',
    wrap=_wrap,
    reason='every layer spec of every script and release passes through it',
    fingerprints=on_every_release('97819a84') | {'0.20': '1a1e5d5b'},
    reads=('config', 'transformer_layer_spec', 'pre_process', 'post_process', 'vp_stage'),
)
