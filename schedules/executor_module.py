"""Any ``torch.nn.Module`` as a stage of a plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_mhc.schedules.executor_split import WeightGradients, backward_input


class ModuleStage:
    """Runs a module for one microbatch after the other; gradients are added to ``.grad``.

    A plan of forward passes runs under ``torch.no_grad``. Override ``reduce`` for replicas.

    Args:
        module: takes and returns one tensor.
        data: on the first stage, the input of a microbatch.
        loss: on the last stage, ``(output, microbatch) -> scalar``; what it returns is kept in
            ``losses``, detached.
        recomputing: keep only the input of a forward pass; an R of the plan runs it again.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        data: Callable[[int], Tensor] | None = None,
        loss: Callable[[Tensor, int], Tensor] | None = None,
        recomputing: bool = False,
    ) -> None:
        self.module, self.data, self.loss, self.recomputing = module, data, loss, recomputing
        self.losses: dict[int, Tensor] = {}
        # By microbatch: the input and, unless it is yet to be recomputed, the output.
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._random: dict[int, list[Tensor]] = {}
        self._weights: dict[int, WeightGradients] = {}

    def forward(self, microbatch: int, x: Tensor | None) -> Tensor | None:
        """Output for the next stage; None on the last."""
        training = torch.is_grad_enabled()
        if x is None:
            assert self.data is not None, 'the first stage needs data'
            x = self.data(microbatch)
        elif training:
            x.requires_grad_()
        if self.recomputing:
            self._random[microbatch] = _random_state()
        with torch.set_grad_enabled(training and not self.recomputing):
            output = self._run(microbatch, x)
        if training:
            self._kept[microbatch] = x, None if self.recomputing else output
        if self.loss is not None:
            self.losses[microbatch] = output.detach()
            return None
        return output.detach()

    def recompute(self, microbatch: int) -> None:
        """Run the forward again, with a graph and the same random numbers."""
        x, _ = self._kept[microbatch]
        now = _random_state()
        _set_random_state(self._random.pop(microbatch))
        self._kept[microbatch] = x, self._run(microbatch, x)
        _set_random_state(now)

    def backward(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Gradient of the input, None on the first stage; the weights' are added."""
        x, output = self._take(microbatch)
        torch.autograd.backward(output, grad)
        gradient, x.grad = x.grad, None
        return gradient

    def backward_input(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Gradient of the input, None on the first stage, where all is left for the weights."""
        x, output = self._take(microbatch)
        gradient, self._weights[microbatch] = backward_input(output, grad, x)
        return gradient

    def backward_weight(self, microbatch: int) -> None:
        """Add the gradients of the weights that ``backward_input`` left."""
        if microbatch not in self._weights:
            raise RuntimeError(f'no weight gradients of microbatch {microbatch} are pending')
        self._weights.pop(microbatch).weight()

    def reduce(self) -> None:
        """All gradients are there, and those of one process are whole."""

    def param_sync(self) -> None:
        """The parameters are whole: nothing to gather."""

    def _run(self, microbatch: int, x: Tensor) -> Tensor:
        output = self.module(x)
        return output if self.loss is None else self.loss(output, microbatch)

    def _take(self, microbatch: int) -> tuple[Tensor, Tensor]:
        x, output = self._kept.pop(microbatch, (None, None))
        if x is None or output is None:
            raise RuntimeError(
                f'microbatch {microbatch} has no forward to go back through: it has not run, was '
                'not recomputed, or its backward has run before'
            )
        return x, output


def _random_state() -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if torch.cuda.is_available() else state


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) == 2:
        torch.cuda.set_rng_state(state[1])
