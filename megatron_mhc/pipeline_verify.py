"""Run a step twice, the second time with full synchronisation, and compare every bit.

What differs between the two runs is when the host waits, so a difference means that some stream
read a tensor before it was written or after it was freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn


class Replayed:
    """An iterator that can be run through a second time.

    Args:
        source: the data iterator of one chunk; None where the rank reads no data.
    """

    def __init__(self, source: Iterator | None) -> None:
        self._source, self._seen, self._position = source, [], 0

    def __iter__(self) -> Replayed:
        return self

    def __next__(self) -> Any:
        if self._position == len(self._seen):
            self._seen.append(_copied(next(self._source)))
        self._position += 1
        return _copied(self._seen[self._position - 1])

    def rewind(self) -> None:
        self._position = 0


def run_twice(
    step: Callable[[list, bool, bool], list],
    model: list[nn.Module],
    iterators: list[Iterator | None],
) -> list:
    """``step(iterators, synchronous, reduce early)`` twice from one state; returns its losses.

    Gradients are not reduced before they are compared.

    Raises:
        RuntimeError: losses or gradients of the two runs differ; names the first that does.
    """
    replayed = [None if source is None else Replayed(source) for source in iterators]
    before = _State(model)
    losses = step(replayed, False, False)
    first = _State(model)
    before.restore()
    for source in replayed:
        if source is not None:
            source.rewind()
    again = step(replayed, True, False)
    for name, tensor in _State(model).gradients.items():
        if not _same(tensor, first.gradients[name]):
            raise RuntimeError(
                f'--pipeline-verify-steps: the gradient of {name} differs from that of the same '
                'step with full synchronisation: a stream read or freed a tensor too early; use '
                '--mhc-post-stream compute and report the case'
            )
    if not _same(losses, again):
        raise RuntimeError(
            '--pipeline-verify-steps: losses differ from those of the same step with full '
            'synchronisation; use --mhc-post-stream compute and report the case'
        )
    return again


class _State:
    """Gradients, module buffers and random number generators of one moment."""

    def __init__(self, model: list[nn.Module]) -> None:
        self._model = model
        self.gradients = {
            f'chunk {index}: {name}': parameter.main_grad.clone()
            for index, chunk in enumerate(model)
            for name, parameter in chunk.named_parameters()
            if getattr(parameter, 'main_grad', None) is not None
        }
        self._buffers = [[b.clone() for b in _buffers(chunk)] for chunk in model]
        self._cpu = torch.get_rng_state()
        self._device = torch.cuda.get_rng_state()
        self._tracker = get_cuda_rng_tracker().get_states()

    @torch.no_grad()
    def restore(self) -> None:
        for index, chunk in enumerate(self._model):
            for name, parameter in chunk.named_parameters():
                if getattr(parameter, 'main_grad', None) is not None:
                    parameter.main_grad.copy_(self.gradients[f'chunk {index}: {name}'])
            for buffer, value in zip(_buffers(chunk), self._buffers[index], strict=True):
                buffer.copy_(value)
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state(self._device)
        get_cuda_rng_tracker().set_states(self._tracker)


def _buffers(chunk: nn.Module) -> list[Tensor]:
    # Megatron's data-parallel wrapper has gradient buffers under the name of the method.
    return list(nn.Module.buffers(chunk))


def _copied(batch: Any) -> Any:
    """Containers are copied: the scripts pop from a batch and replace its entries."""
    if isinstance(batch, dict):
        return {key: _copied(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(map(_copied, batch))
    return batch


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
