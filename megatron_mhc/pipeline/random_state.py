"""The random number generators of a rank at one moment: torch's and Megatron's."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor


class RandomState:
    """Their states now; as values, so that another rank can take them over."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._device = torch.cuda.get_rng_state()
        states = get_cuda_rng_tracker().get_states()
        # Generators where graphs could capture them.
        self._tracker = {name: _value(state).clone() for name, state in states.items()}

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state(self._device)
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        for name, value in self._tracker.items():
            if isinstance(states[name], torch.Generator):
                states[name].set_state(value.clone())
            else:
                states[name] = value.clone()
        tracker.set_states(states)


def _value(state: Tensor | torch.Generator) -> Tensor:
    return state.get_state() if isinstance(state, torch.Generator) else state
