"""Layouts of more GPUs than any that has a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_mhc.schedules.catalog import obstacle
from megatron_mhc.sizing.memory import Layout

# In turn, until the batch divides: the fewest that share tensors keep messages within a node.
_TENSOR_RANKS = (1, 2, 4, 8)


def layout_beyond(batch: int, named: Layout, given: Mapping[str, int]) -> Layout:
    """``named`` on more GPUs: the least tp whose data-parallel ranks divide the batch.

    Where that leaves too few microbatches for the schedule, it is ``zb-v``, which takes any. A
    layout that exists, not the fastest: that is what ``megatron-mhc study`` looks for.

    Args:
        batch: sequences of a step.
        named: where it starts from.
        given: sizes that are to be as they are.

    Raises:
        ValueError: none exists; says why not with the fewest ranks that share tensors.
    """
    first: ValueError | None = None
    tried = (given['tp'],) if 'tp' in given else _TENSOR_RANKS
    for tp in tried:
        for schedule in dict.fromkeys((named.schedule, 'zb-v')):
            try:
                layout = dataclasses.replace(named, **{**given, 'tp': tp}, schedule=schedule)
                microbatches = layout.microbatches(batch)
            except ValueError as error:
                first = first or error
                continue
            if layout.pp == 1 or obstacle(schedule, layout.pp, microbatches) is None:
                return layout
    why = first or 'no schedule exists; change --pp'
    more = f'; tried with --tp {", ".join(map(str, tried))}' if len(tried) > 1 else ''
    raise ValueError(f'{why}{more}')
