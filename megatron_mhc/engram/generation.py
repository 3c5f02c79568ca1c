"""What a memory keeps of sequences that are generated token by token.

N-grams of a new token need the ids before it, and the convolution what it read before. Both are in
Megatron's inference context, beside the keys and values: whatever it does to the sequences of a
batch, such as beam search, it does to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """Of one layer, for one step: ``ids`` join those before them.

    Args:
        context: a ``StaticInferenceContext``.
        number: the layer.
        ids: compressed ids of the step, ``[b, s]``.

    Raises:
        RuntimeError: the step does not follow the one before.
    """

    def __init__(self, context: Any, number: int, ids: Tensor) -> None:
        self._entries, self._name = context.key_value_memory_dict, f'engram {number}'
        start, self._ids = context.sequence_len_offset, ids
        # ``[start, b]`` and ``[reach, b, n*C]``; a context that begins again has those of before.
        entry = self._entries.get(self._name) if start else None
        if start and (entry is None or entry[0].shape != (start, len(ids))):
            raise RuntimeError(
                f'--engram-layers: a step of inference begins with token {start} of {len(ids)} '
                'sequences, and the tokens before it were not seen in this context; pass a prompt '
                'from its first token on, and its tokens in order'
            )
        self.earlier: Tensor = ids[:, :0] if entry is None else entry[0].t()
        self.read: Tensor | None = None if entry is None else entry[1]

    def keep(self, read: Tensor) -> None:
        """For the next step; ``read`` is what the convolution read last, ``[reach, b, n*C]``."""
        self._entries[self._name] = torch.cat([self.earlier, self._ids], 1).t(), read


def check_inference(context: Any, config: Any) -> None:
    """Raise NotImplementedError for inference in which tokens are not all here and in order."""
    if not context.is_static_batching():
        raise NotImplementedError(
            '--engram-layers: dynamic batches do not keep the tokens before the newest ones, which '
            'n-grams need; use the static engine (StaticInferenceContext)'
        )
    if config.pipeline_model_parallel_size > 1:
        raise NotImplementedError(
            '--engram-layers: inference with --pipeline-model-parallel-size > 1 has receive '
            'buffers without token ids; run inference on one pipeline stage'
        )
    if config.sequence_parallel and config.tensor_model_parallel_size > 1:
        raise NotImplementedError(
            '--engram-layers: inference with --sequence-parallel divides tokens that come one by '
            'one; leave it out'
        )
