"""Patches of two copies of a model on one pipeline: both ends have a first and a last stage.

The first chunk of a rank is its earlier stage and the second one its later stage, on every rank, so
that virtual stages mean what Megatron takes them for; only "is this rank an end?" and "which layers
are mine?" get another answer, and both ends need tokens as well as labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_pg_rank, get_pg_size

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.inverted_v import BATCH_PATCHES, EMBEDDING_RANKS_PATCH
from megatron_mhc.pipeline.layer_layout import MirroredLayout


def _end(original: Callable[..., Any], *, chunk: int) -> Callable[..., Any]:
    def is_pipeline_end(ignore_virtual=True, vp_stage=None, *args, **kwargs):
        # Called in any case: it checks its arguments.
        original(ignore_virtual, vp_stage, *args, **kwargs)
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        is_end = parallel_state.get_pipeline_model_parallel_rank() in (0, ranks - 1)
        return is_end and (ignore_virtual or vp_stage in (chunk, None))

    return is_pipeline_end


def _end_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    del original

    def is_pp_end(pp_group, *args, **kwargs):
        return get_pg_rank(pp_group) in (0, get_pg_size(pp_group) - 1)

    return is_pp_end


def _layout_of_two_copies(original: Callable[..., Any]) -> Callable[..., Any]:
    del original

    @functools.lru_cache
    def from_str(layout, pipeline_model_parallel_size, *args, **kwargs):
        return MirroredLayout(layout, pipeline_model_parallel_size)

    return from_str


MIRRORED_PATCHES = (
    *BATCH_PATCHES,
    *(
        Patch(
            id=f'copies-{end}-stage',
            target=f'megatron.core.parallel_state:is_pipeline_{end}_stage',
            wrap=functools.partial(_end, chunk=chunk),
            reason='scripts, data sets and losses ask it where the ends of the model are',
            fingerprints=on_every_release('cb07ec55'),
            reads=('ignore_virtual', 'vp_stage'),
        )
        for chunk, end in enumerate(('first', 'last'))
    ),
    *(
        Patch(
            id=f'copies-{end}-rank',
            target=f'megatron.core.pipeline_parallel.utils:is_pp_{end}_stage',
            wrap=_end_rank,
            reason='mixed precision casts what enters the first stage and leaves the last one',
            fingerprints=on_every_release('d7f1b2e1'),
            reads=('pp_group',),
        )
        for end in ('first', 'last')
    ),
    Patch(
        id='copies-layout',
        target='megatron.core.transformer.pipeline_parallel_layer_layout:'
        'PipelineParallelLayerLayout.from_str',
        wrap=_layout_of_two_copies,
        reason='the layout tells every chunk its layers and their numbers in the whole model',
        fingerprints=on_every_release('0a59404f'),
        reads=('layout', 'pipeline_model_parallel_size'),
    ),
    EMBEDDING_RANKS_PATCH,
)
