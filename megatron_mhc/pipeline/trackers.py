"""What a step adds to outside of the model: Megatron's trackers of losses that are only logged.

A forward adds auxiliary losses of routers, losses of prediction layers and of sparse-attention
indexers to global sums, which Megatron divides by the number of microbatches when it logs.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_TRANSFORMER = 'megatron.core.transformer.'
# Module, and the path of an attribute in it; releases differ in what they have.
TRACKERS = (
    # From 0.18 on, and 0.17.
    (f'{_TRANSFORMER}moe.moe_logging', '_MOE_METRICS_TRACKER'),
    (f'{_TRANSFORMER}moe.moe_utils', '_MOE_LAYER_WISE_LOGGING_TRACKER'),
    (f'{_TRANSFORMER}multi_token_prediction', 'MTPLossLoggingHelper.tracker'),
    (f'{_TRANSFORMER}experimental_attention_variant.dsa', 'DSAIndexerLossLoggingHelper.tracker'),
    # Which check of a result is the how manyth in this step.
    ('megatron.core.rerun_state_machine', '_GLOBAL_RERUN_STATE_MACHINE.validation_counts'),
)


class Trackers:
    """The trackers of one moment."""

    def __init__(self) -> None:
        self._kept = [(owner, name, _copied(getattr(owner, name))) for owner, name in _found()]

    def restore(self) -> None:
        """Put them back."""
        for owner, name, value in self._kept:
            setattr(owner, name, _copied(value))


def _found() -> Iterator[tuple[Any, str]]:
    """Owner and attribute of every tracker that this release has."""
    for module, path in TRACKERS:
        *names, last = path.split('.')
        # What was never imported was never added to.
        owner = sys.modules.get(module)
        for name in names:
            owner = getattr(owner, name, None)
        if hasattr(owner, last):
            yield owner, last


def _copied(value: Any) -> Any:
    """With tensors of its own; process groups and numbers as they are."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        # Of the same kind: some make their entries up.
        found = copy.copy(value)
        found.update({key: _copied(entry) for key, entry in value.items()})
        return found
    if dataclasses.is_dataclass(value) or type(value).__name__ == 'MoEMetricsTracker':
        found = copy.copy(value)
        vars(found).update({name: _copied(entry) for name, entry in vars(value).items()})
        return found
    return value
