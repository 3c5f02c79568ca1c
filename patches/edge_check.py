"""Before the first message, neighbouring pipeline stages tell each other the width of their edge.

A stage started without hyper-connections, or with another n, would exchange messages of another
width; the receiver would read a part of one, or wait for ever. The widths travel through the
rendezvous store of ``torch.distributed``, which has a timeout and cannot deadlock.
"""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mhc.pipeline.edges import default_timeout, describe_edge
from megatron_mhc.settings.model_config import RESIDUAL

_BUILDS = itertools.count()


def agree_on_edges(config: Any, timeout: datetime.timedelta | None = None) -> None:
    """Compare this rank's edge with those of its pipeline neighbours.

    Args:
        config: the model's config.
        timeout: how long to wait for a neighbour to build its model; default
            ``--distributed-timeout-minutes`` (10 minutes).

    Raises:
        RuntimeError: a neighbour announces another width, or none at all.
    """
    if config.pipeline_model_parallel_size < 2 or not parallel_state.is_initialized():
        return
    # Each rank builds the same number of models (teachers, for one) in the same order.
    build = next(_BUILDS)
    store = dist.distributed_c10d._get_default_store()
    residual = RESIDUAL.peek(config)
    kind = 'standard' if residual is None else residual.residual_type
    edge = f'{kind}, {describe_edge(config)}'
    rank = dist.get_rank()
    store.set(_key(build, rank), edge)
    timeout = timeout or default_timeout()
    for neighbour in {
        parallel_state.get_pipeline_model_parallel_prev_rank(),
        parallel_state.get_pipeline_model_parallel_next_rank(),
    }:
        try:
            store.wait([_key(build, neighbour)], timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f'pipeline rank {neighbour} announced no edge within {timeout}: it runs '
                'without --residual-type and --engram-layers, or died; start every rank with the '
                'same command'
            ) from error
        theirs = store.get(_key(build, neighbour)).decode()
        if theirs != edge:
            raise RuntimeError(
                f'pipeline edge mismatch: rank {rank} has [{edge}], its neighbour rank {neighbour} '
                f'has [{theirs}]; start every rank with the same command'
            )


def _key(build: int, rank: int) -> str:
    return f'megatron_mhc/edge/{build}/{rank}'
