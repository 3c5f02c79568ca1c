"""Run a step twice, the second time with full synchronisation, and compare every bit.

What differs between the two runs is when the host waits, so a difference means that some stream
read a tensor before it was written or after it was freed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mhc.pipeline.random_state import RandomState
from megatron_mhc.pipeline.trackers import Trackers
from megatron_mhc.schedules.executor_debug import first_difference


class Replayed:
    """An iterator that can be run through a second time.

    Args:
        source: the data iterator of one chunk.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._position = source, 0
        self._seen: list[Any] = []

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
    step: Callable[[list[Any], bool, bool], list[Any]],
    model: list[nn.Module],
    iterators: list[Iterator[Any] | None],
) -> list[Any]:
    """``step(iterators, synchronous, reduce early)`` twice from one state; returns its losses.

    Gradients are not reduced before they are compared. What a step leaves behind is there once.

    Raises:
        RuntimeError: losses or gradients of the two runs differ; names the first that does.
    """
    replayed = [None if source is None else Replayed(source) for source in iterators]
    before = _State(model)
    losses = step(replayed, False, False)
    first = _results(losses, _State(model))
    before.restore()
    for source in replayed:
        if source is not None:
            source.rewind()
    with _unwatched(model):
        again = step(replayed, True, False)
    difference = first_difference(first, _results(again, _State(model)))
    if difference is not None:
        raise RuntimeError(
            f'--pipeline-verify-steps: {difference}: a step differs from the same step with full '
            'synchronisation: a stream read or freed a tensor too early; use --mhc-post-stream '
            'compute and report the case'
        )
    return again


@contextlib.contextmanager
def _unwatched(model: list[nn.Module]) -> Iterator[None]:
    """Without the probes of ``--mhc-monitor``, which have seen the step."""
    probes: list[tuple[Any, Any]] = [
        (module, module.probe)
        for chunk in model
        for module in chunk.modules()
        if getattr(module, 'probe', None) is not None
    ]
    for module, _ in probes:
        module.probe = None
    try:
        yield
    finally:
        for module, probe in probes:
            module.probe = probe


class _State:
    """Gradients, module buffers, random number generators and trackers of one moment.

    Buffers have what routers count: tokens of experts, of a step and of a batch.
    """

    def __init__(self, model: list[nn.Module]) -> None:
        self._model = model
        self.gradients = {
            key: gradient.clone()
            for key, parameter in self._parameters()
            if (gradient := _gradient(parameter)) is not None
        }
        self._buffers = [[b.clone() for b in _buffers(chunk)] for chunk in model]
        self._random = RandomState()
        import numpy

        self._host = random.getstate(), numpy.random.get_state()
        self._trackers = Trackers()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for index, chunk in enumerate(self._model):
            for name, parameter in chunk.named_parameters():
                yield f'chunk {index}: {name}', parameter

    @torch.no_grad()
    def restore(self) -> None:
        for key, parameter in self._parameters():
            if key in self.gradients:
                gradient = _gradient(parameter)
                assert gradient is not None
                gradient.copy_(self.gradients[key])
            else:
                # Without Megatron's buffers a first backward makes the gradient.
                parameter.grad = None
        for index, chunk in enumerate(self._model):
            for buffer, value in zip(_buffers(chunk), self._buffers[index], strict=True):
                buffer.copy_(value)
        self._random.restore()
        import numpy

        random.setstate(self._host[0])
        numpy.random.set_state(self._host[1])
        self._trackers.restore()


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    main = getattr(parameter, 'main_grad', None)
    return parameter.grad if main is None else main


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


def _results(losses: list[Any], state: _State) -> dict[str, Tensor]:
    """All gradients and numbers among the losses, by name."""
    gradients = {f'the gradient of {key}': value for key, value in state.gradients.items()}
    return gradients | dict(_numbers('loss', losses))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor | float | int):
        yield name, torch.as_tensor(value)
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(f'{name} {key}', part)
