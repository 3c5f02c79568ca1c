"""Patches of two copies of a model on one pipeline: both ends have a first and a last stage.

The first chunk of a rank is its earlier stage and the second one its later stage, on every rank, so
that virtual stages mean what Megatron takes them for; only "is this rank an end?" and "which layers
are mine?" get another answer, and both ends need tokens as well as labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_pg_rank, get_pg_size

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.inverted_v import BATCH_PATCHES, INVERTED_V_PATCHES
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


# On one name there is one seam, so what the inverted V rebinds too is its patch with another wrap.
_ON_V = {patch.id: patch for patch in INVERTED_V_PATCHES}
_LIKE_A_V: dict[str, Callable[..., Any]] = {
    'v-first-stage': functools.partial(_end, chunk=0),
    'v-first-rank': _end_rank,
    'v-layout': _layout_of_two_copies,
}
MIRRORED_PATCHES = (
    *BATCH_PATCHES,
    *(dataclasses.replace(_ON_V[id], wrap=wrap) for id, wrap in _LIKE_A_V.items()),
    Patch(
        id='copies-last-stage',
        target='megatron.core.parallel_state:is_pipeline_last_stage',
        wrap=functools.partial(_end, chunk=1),
        reason='scripts, data sets and losses ask it where the output layer is',
        fingerprints=on_every_release('cb07ec55'),
        reads=('ignore_virtual', 'vp_stage'),
    ),
    Patch(
        id='copies-last-rank',
        target='megatron.core.pipeline_parallel.utils:is_pp_last_stage',
        wrap=_end_rank,
        reason='mixed precision casts the outputs of the last stage',
        fingerprints=on_every_release('d7f1b2e1'),
        reads=('pp_group',),
    ),
    _ON_V['v-embedding-ranks'],
)
