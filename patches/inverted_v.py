"""Patches of the inverted V: what Megatron must know of a first stage on the last pipeline rank.

The last stage is where Megatron expects it. Only the questions "is this the first stage?", "which
layers are mine?" and "who has the embedding?" get another answer, and the batch of the rank with
both ends needs tokens as well as labels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_pg_rank, get_pg_size

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.pipeline.layer_layout import InvertedVLayout
from megatron_mhc.schedules.inverted_v import by_chunk_and_rank, stage_of
from megatron_mhc.schedules.pattern_stages import stages_of

_building_datasets = False


def _first_stage(original: Callable[..., Any]) -> Callable[..., Any]:
    def is_pipeline_first_stage(ignore_virtual=True, vp_stage=None, *args, **kwargs):
        # Called in any case: it checks its arguments.
        if original(ignore_virtual, vp_stage, *args, **kwargs) and _building_datasets:
            return True
        first_chunk = ignore_virtual or vp_stage in (0, None)
        return first_chunk and parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    return is_pipeline_first_stage


def _with_datasets_on_rank_0(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_train_valid_test_data_loaders(*args, **kwargs):
        # Rank 0 builds the index files before the others do, and tells them whether there is data.
        global _building_datasets
        _building_datasets = True
        try:
            return original(*args, **kwargs)
        finally:
            _building_datasets = False

    return build_train_valid_test_data_loaders


def _first_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    del original

    def is_pp_first_stage(pp_group, *args, **kwargs):
        return get_pg_rank(pp_group) == get_pg_size(pp_group) - 1

    return is_pp_first_stage


def _layout_in_stage_order(original: Callable[..., Any]) -> Callable[..., Any]:
    del original

    @functools.lru_cache
    def from_str(layout, pipeline_model_parallel_size, *args, **kwargs):
        return InvertedVLayout(layout, pipeline_model_parallel_size)

    return from_str


def _segment_of_the_stage(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def select_pipeline_segment(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        ranks, rank = get_pg_size(given['pp_group']), get_pg_rank(given['pp_group'])
        stages = stages_of(given['main_pattern'], ranks)
        before = stages[: stage_of(rank, given['vp_stage'] or 0, ranks)]
        given['main_pattern'] = '|'.join(by_chunk_and_rank(stages, ranks))
        layers, _ = original(*bound.args, **bound.kwargs)
        return layers, sum(map(len, before))

    return select_pipeline_segment


def _both_ends_on_the_last_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_model_parallel(*args, **kwargs):
        for name in ('get_embedding_ranks', 'get_position_embedding_ranks'):
            kwargs[name] = _last_of
        return original(*args, **kwargs)

    return initialize_model_parallel


def _last_of(pp_ranks, *others):
    return [pp_ranks[-1]]


def _whole_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def get_batch_on_this_tp_rank(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            # What a rank with prediction layers gets: tokens and labels.
            bound.arguments['mtp_on_this_rank'] = True
        return original(*bound.args, **bound.kwargs)

    return get_batch_on_this_tp_rank


# Scripts import the batch function by name, so these are in place before a script runs.
BATCH_PATCHES = tuple(
    Patch(
        id=f'v-batch-{id}',
        target=f'{module}:get_batch_on_this_tp_rank',
        wrap=_whole_batch,
        reason='the rank with both ends of the model needs tokens and labels',
        fingerprints=fingerprints,
        reads=('mtp_on_this_rank',),
    )
    for id, module, fingerprints in (
        ('training', 'megatron.training.utils', {'0.17': 'bd705646'}),
        (
            'core',
            'megatron.core.utils',
            {'0.18': '896c4a94', '0.19': '2ea2ddb0', '0.20': '2ea2ddb0'},
        ),
    )
)
_PATTERN_PATCHES = tuple(
    Patch(
        id=f'v-{kind}-pattern',
        target=f'{module}:select_pipeline_segment',
        wrap=_segment_of_the_stage,
        reason='it tells every chunk of a hybrid model its layers and how many are before it',
        fingerprints=fingerprints,
        reads=('main_pattern', 'pp_group', 'vp_stage'),
    )
    for kind, module, fingerprints in (
        (
            'hybrid',
            'megatron.core.models.hybrid.hybrid_layer_allocation',
            {'0.18': '90c005cd', '0.19': 'c9ab46e3', '0.20': 'c9ab46e3'},
        ),
        ('mamba', 'megatron.core.ssm.mamba_hybrid_layer_allocation', {'0.17': '90c005cd'}),
    )
)
PATTERN_PATCHES = frozenset(patch.id for patch in _PATTERN_PATCHES)
EMBEDDING_RANKS_PATCH = Patch(
    id='v-embedding-ranks',
    target='megatron.core.parallel_state:initialize_model_parallel',
    wrap=_both_ends_on_the_last_rank,
    reason='the embedding groups are made of the ranks that hold an end of the model',
    fingerprints={
        '0.17': '2f6507d0',
        '0.18': '75e84cde',
        '0.19': '7e62d451',
        '0.20': '7e62d451',
    },
    reads=('get_embedding_ranks', 'get_position_embedding_ranks'),
)
INVERTED_V_PATCHES = (
    *BATCH_PATCHES,
    Patch(
        id='v-first-stage',
        target='megatron.core.parallel_state:is_pipeline_first_stage',
        wrap=_first_stage,
        reason='scripts and data sets ask it where the embedding is',
        fingerprints=on_every_release('cb07ec55'),
        reads=('ignore_virtual', 'vp_stage'),
    ),
    Patch(
        id='v-datasets',
        target='megatron.training.training:build_train_valid_test_data_loaders',
        wrap=_with_datasets_on_rank_0,
        reason='rank 0, which has neither end of the model, must build the data sets first',
        fingerprints=on_every_release('c30e7601'),
    ),
    Patch(
        id='v-first-rank',
        target='megatron.core.pipeline_parallel.utils:is_pp_first_stage',
        wrap=_first_rank,
        reason='mixed precision casts the inputs of the first stage',
        fingerprints=on_every_release('d7f1b2e1'),
        reads=('pp_group',),
    ),
    Patch(
        id='v-layout',
        target='megatron.core.transformer.pipeline_parallel_layer_layout:'
        'PipelineParallelLayerLayout.from_str',
        wrap=_layout_in_stage_order,
        reason='the layout tells every chunk its layers and their numbers in the whole model',
        fingerprints=on_every_release('0a59404f'),
        reads=('layout', 'pipeline_model_parallel_size'),
    ),
    *_PATTERN_PATCHES,
    EMBEDDING_RANKS_PATCH,
)
