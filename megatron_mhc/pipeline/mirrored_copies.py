"""Two copies of a model on one pipeline, kept equal: DualPipe in Megatron.

Rank r of P holds stage r of copy 0 and stage P - 1 - r of copy 1 (``schedules.mirrored``). The
copies are two data-parallel replicas that share devices: copy d takes microbatches d, d + 2, ... of
a step, and what the copies of a stage have added up is summed between the two ranks that hold
them, once, before Megatron reduces over data-parallel ranks. Sums of two are the same on both
sides, so copies that begin equal stay equal, bit for bit, under every optimizer that looks at
gradients alone.

They begin equal because a stage is built from the random numbers of the rank that has it under
1F1B. Copy 1 counts in no norm (``shared``, as Megatron marks copies of an embedding), and is not written
to checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from torch import Tensor, nn

from megatron_mhc.pipeline.edges import own_device
from megatron_mhc.pipeline.random_state import RandomState
from megatron_mhc.schedules.mirrored import copy_of, mirror_of, stage_of

CHUNKS = 2
# Values exchanged at a time: what arrives has to lie somewhere before it is added.
_PIECE = 2**24
# Of the model that is being built: what each rank began with, and what this one goes on with.
_begun: list[RandomState] = []
_left: list[RandomState] = []


@contextlib.contextmanager
def drawn_as_copies(group: dist.ProcessGroup, chunk: int) -> Iterator[None]:
    """Build chunk 0 or 1 of this rank in the context; all ranks of ``group`` do, in this order.

    A stage is built from the random numbers with which the rank of its number begins, as under
    1F1B, and every rank goes on with those that it would have there.

    Raises:
        RuntimeError: chunk 1 is built before chunk 0.
    """
    ranks, rank = group.size(), group.rank()
    if chunk == 0:
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, RandomState(), group=group)
        _begun[:] = found
    elif not _begun:
        raise RuntimeError(
            'the second chunk of a rank was built before the first one, so the random numbers that '
            'its stage begins with are unknown; build chunks in order'
        )
    _begun[stage_of(rank, chunk, ranks)].restore()
    yield
    if copy_of(rank, chunk, ranks) == 0:
        _left[:] = [RandomState()]
    if chunk == CHUNKS - 1:
        _left.pop().restore()
        _begun.clear()


def mark_copy(chunk: nn.Module, group: dist.ProcessGroup, number: int) -> None:
    """Leave chunk ``number`` of this rank, as it is built, out of norms and checkpoints if it is
    of copy 1."""
    if copy_of(group.rank(), number, group.size()) == 0:
        return
    for parameter in chunk.parameters():
        # ``shared`` is Megatron's word.
        parameter.shared = True  # type: ignore[attr-defined]
    written = functools.partial(_as_replica, chunk.sharded_state_dict)
    chunk.sharded_state_dict = written  # type: ignore[assignment]


def _as_replica(original: Callable[..., Any], *args, **kwargs) -> Any:
    """The sharded state of a chunk of which another rank writes the same."""
    return dict_list_map_inplace(_not_main, original(*args, **kwargs))


def _not_main(entry: Any) -> Any:
    replica = getattr(entry, 'replica_id', None)
    if replica is None:
        return entry
    # (pipeline, tensor, data): the one of zeros is written, and copies count as pipeline ranks.
    pipeline, *others = (replica,) if isinstance(replica, int) else replica
    entry.replica_id = pipeline + 1 if isinstance(replica, int) else (pipeline + 1, *others)
    return entry


def split_batches(
    iterators: list[Iterator[Any] | None],
    group: dist.ProcessGroup,
    microbatches: int,
    evaluating: bool,
) -> list[Iterator[Any] | None]:
    """What each chunk reads in a step: every second microbatch, or all where copy 0 evaluates.

    Args:
        iterators: of each chunk, over all microbatches.
        group: the pipeline-parallel group.
        microbatches: of the step, m.
        evaluating: forward passes of copy 0.
    """
    if evaluating:
        return iterators
    split: list[Iterator[Any] | None] = []
    for chunk, source in enumerate(iterators):
        copy = copy_of(group.rank(), chunk, group.size())
        # The others are read as well, so that the next step begins where this one ends.
        batches = None if source is None else list(itertools.islice(source, microbatches))
        split.append(None if batches is None else iter(batches[copy::2]))
    return split


@torch.no_grad()
def sum_copies(model: list[nn.Module], group: dist.ProcessGroup) -> None:
    """Give the two copies of every stage the sum of their gradients, and start what then follows.

    Both ranks hold the same stage as the same chunk, so they exchange them in one order.

    Args:
        model: the two chunks, as Megatron wraps them.
        group: the pipeline-parallel group.
    """
    peer = dist.get_global_rank(group, mirror_of(group.rank(), group.size()))
    for chunk in model:
        for values in _summed(chunk):
            for piece in values.view(-1).split(_PIECE):
                other = torch.empty_like(piece)
                sends = dist.P2POp(dist.isend, piece, peer, group)
                receives = dist.P2POp(dist.irecv, other, peer, group)
                for work in dist.batch_isend_irecv([sends, receives]):
                    work.wait()
                piece.add_(other)
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.start_grad_sync()


def _summed(chunk: Any) -> Iterator[Tensor]:
    """What the copies of a chunk add up: gradients, and tokens that routers have counted."""
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        yield buffer.grad_data
    for module in chunk.modules():
        counts = getattr(module, 'local_tokens_per_expert', None)
        if counts is not None:
            yield counts


def shared_losses(losses: list[Any], group: dist.ProcessGroup) -> list[Any]:
    """Loss records of both copies in the order of their microbatches, on both ends of the pipeline.

    Args:
        losses: of this rank, empty except on an end.
        group: the pipeline-parallel group.
    """
    ranks, rank = group.size(), group.rank()
    found: list[Any] = [None] * ranks
    # Tensors go by way of the host: each process has a device of its own.
    dist.all_gather_object(found, _moved(losses, 'cpu'), group=group)
    if rank not in (0, ranks - 1):
        return []
    # Copy 0 ends on the last rank, and has the first microbatch.
    pairs = itertools.zip_longest(found[-1], found[0])
    records = [record for pair in pairs for record in pair if record is not None]
    return _moved(records, own_device())


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value
