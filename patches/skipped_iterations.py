"""Patch: the step of ``--iterations-to-skip``, which reads a batch and trains on nothing.

Megatron's takes one iterator. With two chunks a rank there are two, and on ranks that hold neither
end of the model there is none, which it reads from all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine

from megatron_mhc.patches.engine import Patch, on_every_release


def together(iterators: list[Iterator[Any]]) -> Iterator[Any]:
    """The batches of the first of ``iterators``, while all of them advance."""
    while True:
        # Megatron's have no __iter__.
        yield [next(iterator) for iterator in iterators][0]


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def dummy_train_step(data_iterator):
        ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        if not any(ends):
            # All ranks ask it: it may compare what they say.
            while get_rerun_state_machine().should_run_forward_backward(None):
                pass
            return
        each = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        read = [iterator for iterator in each if iterator is not None]
        if not read:
            # Of the ranks that share a tensor one reads, and sends it to the others.
            original(None)
            return
        original(RerunDataIterator(together(read)))
        for iterator in read:
            # What they keep for a step that runs again.
            iterator.advance()

    return dummy_train_step


SKIPPED_ITERATIONS_PATCH = Patch(
    id='skipped-iterations',
    target='megatron.training.training:dummy_train_step',
    wrap=_wrap,
    reason='it reads from one iterator on every rank, and a V has two on one rank and none on most',
    fingerprints=on_every_release('5ab593c0'),
    reads=('data_iterator',),
)
