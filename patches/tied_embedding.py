"""Patch: where Megatron sums the gradients of the copies of the word embedding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.pipeline.tied_embedding import sum_tied_gradients


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def allreduce_word_embedding_grads(model, *args, **kwargs):
        original(model, *args, **kwargs)
        sum_tied_gradients(model)

    return allreduce_word_embedding_grads


TIED_EMBEDDING_PATCH = Patch(
    id='tied-embedding',
    target='megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads',
    wrap=_wrap,
    reason='the all-reduce between ranks leaves out copies that are chunks of one rank',
    fingerprints=on_every_release('3c41adc0'),
)
