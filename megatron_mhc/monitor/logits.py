"""Gradients of the logits of H_res: what of the loss reaches them through the manifold.

The fused ops keep logits and their gradients to themselves. What flows back to H_res does pass
through autograd: of some tokens it is kept, and taken through the manifold when a report is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mhc.residual.hyper_connection import HyperConnection


class LogitGradients:
    """Of the first microbatch of a step, one row for each connection.

    Args:
        connections: with the same settings, as a model has them.
    """

    def __init__(self, connections: Sequence[HyperConnection]) -> None:
        self._connections = connections
        self._watched = [0] * len(connections)
        self.forget()

    def watch(self, row: int, iteration: int, h_res: Tensor, chosen: Tensor) -> None:
        """Keep what will flow back to the ``chosen`` tokens of ``h_res``, once an iteration.

        The first forward with a graph counts, which may be one that is run again for the backward:
        both come in the order of the microbatches.
        """
        if self._watched[row] == iteration or not h_res.requires_grad:
            return
        self._watched[row] = iteration
        shape = h_res.shape[-2:]

        def keep(gradient: Tensor) -> None:
            self._kept[row] = gradient.reshape(-1, *shape)[chosen].float()

        # torch's own annotations leave it out.
        h_res.register_hook(keep)  # type: ignore[no-untyped-call]

    def of(self, logits: Tensor) -> Tensor:
        """The gradients of ``logits``, ``[S, K, M]``; 0 where none flowed back."""
        if not logits.shape[-1]:
            return logits
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            h_res = self._connections[0].projected(logits)
        nothing = torch.zeros_like(h_res[0])
        kept = torch.stack([nothing if one is None else one for one in self._kept])
        (gradient,) = torch.autograd.grad(h_res, logits, kept)
        return gradient

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept: list[Tensor | None] = [None] * len(self._connections)
