"""Token ids on their way through the model: of a microbatch, and beside the streams of a stage.

Megatron gives them to the first pipeline stage only. They go on to the others in one tensor with
the streams (``residual/message.py``), so that each message has its own, whatever the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mhc.residual.message import pack, unpack
from megatron_mhc.settings.engram import EngramConfig

# Whole numbers up to here are themselves in fp32.
LARGEST_ID = 2**24


class Tokens(NamedTuple):
    """The tokens of a microbatch.

    Args:
        ids: compressed ids >= 1, ``[b, s]``, int64.
        positions: place of each token in its document, ``[b, s]``, int64.
    """

    ids: Tensor
    positions: Tensor


def placed(
    ids: Tensor, position_ids: Tensor | None, bounds: Tensor | None, start: int = 0
) -> Tokens:
    """Tokens within their documents.

    Args:
        ids: compressed ids, ``[b, s]``.
        position_ids: ``[b, s]``; they may begin again with every document.
        bounds: of packed documents, ``[documents + 1]``: where each begins and the last ends.
        start: tokens that came before these.
    """
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
    if bounds is not None:
        # What follows the last document is padding, and one more of them.
        bounds = bounds.to(positions.dtype)
        document = torch.searchsorted(bounds, positions.contiguous(), right=True) - 1
        positions = positions - bounds[document]
    elif position_ids is not None:
        positions = position_ids.minimum(positions)
    return Tokens(ids, positions)


def own_share(x: Tensor, group: torch.distributed.ProcessGroup, divided: bool) -> Tensor:
    """Of ``[s, ...]`` the part of this rank where ``divided``: with sequence parallelism."""
    return x.chunk(group.size())[group.rank()] if divided else x


def sent(x: Tensor, tokens: Tokens, group: torch.distributed.ProcessGroup, divided: bool) -> Tensor:
    """Streams ``[s, b, W]`` and their tokens -> message for the next stage.

    Args:
        x: what leaves the stage.
        tokens: of the whole sequence.
        group: the tensor-parallel ranks.
        divided: whether ``x`` has this rank's share of s.
    """
    numbers = torch.stack([values.t() for values in tokens], dim=-1)
    return pack(x, own_share(numbers, group, divided).float())


def received(
    message: Tensor,
    engram: EngramConfig,
    group: torch.distributed.ProcessGroup,
    divided: bool,
) -> tuple[Tensor, Tokens]:
    """The reverse of ``sent``."""
    wide = message.shape[-1] - engram.edge_values(message.dtype.itemsize)
    x, numbers = unpack(message, len(Tokens._fields), wide)
    numbers = numbers.detach()
    if divided:
        numbers = gather_from_sequence_parallel_region(numbers, group=group)
    ids, positions = numbers.long().permute(2, 1, 0)
    return x, Tokens(ids.contiguous(), positions)
