"""Copies of the word embedding in several chunks of one pipeline rank: filled, and summed.

Megatron all-reduces the copies between pipeline ranks. Where one rank holds all of them, that group
has one member: on the inverted V with tied embeddings, and wherever multi-token prediction is in
another chunk of the embedding's rank. The second copy would start at zero and go its own way; it is
filled and the gradients are summed here, with no communication. ``embedding_copies`` says which
layouts these are.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.utils import get_attr_wrapped_model
from torch import nn

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# The chunk that holds the embedding, of the model that is being built.
_first_chunk: weakref.ref[GPTModel] | None = None


def has_second_copy(chunk: nn.Module) -> bool:
    """Whether a GPT chunk holds a copy of the first chunk's word embedding."""
    if chunk.pre_process:
        return False
    tied = chunk.post_process and chunk.share_embeddings_and_output_weights
    return bool(tied or getattr(chunk, 'mtp_process', False))


def drop_unused_output_weight(chunk: nn.Module) -> None:
    """Free the output weight of a chunk that multiplies by its copy of the embedding instead.

    Megatron leaves it out of a model on one pipeline rank, and on several it stops at the first
    checkpoint because it is there.
    """
    multiplies = getattr(chunk, 'mtp_process', False) and chunk.share_embeddings_and_output_weights
    if multiplies and chunk.post_process and isinstance(chunk.output_layer, ColumnParallelLinear):
        chunk.output_layer.weight = None


@torch.no_grad()
def tie(chunk: GPTModel) -> None:
    """Fill the second copy of a rank that holds all; called for every chunk as it is built.

    Raises:
        RuntimeError: the chunk with the embedding was not built before it on this rank.
    """
    global _first_chunk
    if chunk.pre_process:
        _first_chunk = weakref.ref(chunk)
    if not has_second_copy(chunk):
        return
    first = None if _first_chunk is None else _first_chunk()
    if first is None:
        raise RuntimeError(
            'tied embeddings: the last chunk was built before the first one on this rank, so its '
            'copy of the word embedding has nothing to be filled from; build chunks in order'
        )
    source, copy = (c.shared_embedding_or_output_weight() for c in (first, chunk))
    copy.copy_(source)
    # The distributed optimizer must divide both copies the same way over its ranks.
    source.shared_embedding = copy.shared_embedding = True
    # Copies are trained alike only by the same optimizer: 0.17 forgets the mark by which Muon knows
    # the copy of the prediction layers.
    copy.is_embedding_or_output_parameter = True


@torch.no_grad()
def sum_tied_gradients(model: list[nn.Module]) -> None:
    """Give the copies on this rank the sum of their gradients, once data-parallel ranks agree."""
    if len(model) < 2:
        return
    chunks = [get_attr_wrapped_model(m, 'pre_process', return_model_obj=True) for m in model]
    first = next((chunk for chunk in chunks if chunk.pre_process), None)
    for last in chunks:
        if first is None or not has_second_copy(last):
            continue
        weights = [c.shared_embedding_or_output_weight() for c in (first, last)]
        # A frozen embedding has no gradient.
        if all(weight.requires_grad for weight in weights):
            own, other = (weight.main_grad for weight in weights)
            own.add_(other)
            other.copy_(own)
