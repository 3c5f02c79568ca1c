"""Word embedding and output layer that share a weight, when both ends are on one pipeline rank.

Megatron keeps one copy in the first stage's chunk and one in the last's and all-reduces both
between pipeline ranks. On the inverted V the two chunks are on the same rank, so the group of that
all-reduce has one member; the copies are filled and their gradients summed here, with no
communication. Multi-token prediction has a copy of the word embedding in the last chunk too.
"""

from __future__ import annotations

import weakref

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import nn

# The chunk that holds the embedding, of the model that is being built.
_first_chunk: weakref.ref | None = None


def has_second_copy(chunk: nn.Module) -> bool:
    """Whether a GPT chunk holds a copy of the first chunk's word embedding."""
    if chunk.pre_process:
        return False
    tied = chunk.post_process and chunk.share_embeddings_and_output_weights
    return bool(tied or getattr(chunk, 'mtp_process', False))


@torch.no_grad()
def tie(chunk: nn.Module) -> None:
    """Fill the last chunk's copy; called for every GPT chunk as soon as it is built.

    Raises:
        RuntimeError: the chunk with the embedding was not built before it on this rank.
    """
    global _first_chunk
    if chunk.pre_process:
        _first_chunk = weakref.ref(chunk)
    if not has_second_copy(chunk):
        return
    first = _first_chunk and _first_chunk()
    if first is None:
        raise RuntimeError(
            'tied embeddings: the last chunk was built before the first one on this rank, so its '
            'copy of the word embedding has nothing to be filled from; build chunks in order'
        )
    source, copy = (c.shared_embedding_or_output_weight() for c in (first, chunk))
    copy.copy_(source)
    # The distributed optimizer must divide both copies the same way over its ranks.
    source.shared_embedding = copy.shared_embedding = True


@torch.no_grad()
def sum_tied_gradients(model: list[nn.Module]) -> None:
    """Give both copies the sum of their gradients, after the reduction over data-parallel ranks."""
    chunks = [get_attr_wrapped_model(m, 'pre_process', return_model_obj=True) for m in model]
    for last in chunks:
        if not has_second_copy(last):
            continue
        first = next(chunk for chunk in chunks if chunk.pre_process)
        gradients = [c.shared_embedding_or_output_weight().main_grad for c in (first, last)]
        gradients[0].add_(gradients[1])
        gradients[1].copy_(gradients[0])
