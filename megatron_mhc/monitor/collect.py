"""Collection: what a rank notes of its own sublayers while a step runs.

Every sublayer reports its streams, maps and output once a forward. Of the first microbatch of a
step that will be reported some tokens are kept; with an alarm on, whether anything was not finite
is noted for every microbatch of every step. All of it stays on the device: nothing here waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.monitor.gradients import MappingGradients
from megatron_mhc.monitor.logits import LogitGradients
from megatron_mhc.monitor.metrics import Sample
from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.settings.flags_monitor import MonitorConfig


class Monitor:
    """Watches the hyper-connections of this rank's model chunks.

    Args:
        chunks: the model chunks, as Megatron wraps them.
        settings: interval, number of tokens and alarm.
        iteration: the number of the step that runs, as it will be logged.
    """

    _gradient_squares: Tensor | None

    def __init__(
        self, chunks: Iterable[nn.Module], settings: MonitorConfig, iteration: Callable[[], int]
    ) -> None:
        self.settings, self._iteration = settings, iteration
        chunks = list(chunks)
        found = [m for c in chunks for m in c.modules() if isinstance(m, HyperConnection)]
        self.connections = sorted(found, key=lambda connection: connection.row)
        parameter = next((p for c in chunks for p in c.parameters()), None)
        self.device = torch.device('cuda') if parameter is None else parameter.device
        self.gradients = MappingGradients(chunks, self.connections)
        self.logit_gradients = LogitGradients(self.connections)
        # Whether the last step reported had a gradient norm that is not finite.
        self.broken = False
        # The largest effective rank of each sublayer's streams so far, ``[L]``.
        self.ranks: Tensor | None = None
        self._sampled = [0] * len(self.connections)
        self._clear()
        for row, connection in enumerate(self.connections):
            connection.probe = functools.partial(self._observe, row)

    @property
    def sublayers(self) -> list[int]:
        """Row in the tables of the whole model of each sublayer that this rank holds, ascending."""
        return [connection.row for connection in self.connections]

    def is_due(self, iteration: int) -> bool:
        """Whether a step is reported; the same on every rank."""
        return iteration % self.settings.interval == 0

    def _watches(self, iteration: int) -> bool:
        return self.settings.alarm != 'off' or self.is_due(iteration)

    @torch.no_grad()
    def _observe(
        self, row: int, x: Tensor, carried: ops.Carried, y: Tensor, bias: Tensor | None
    ) -> None:
        iteration = self._iteration()
        due = self.is_due(iteration)
        if due:
            self.logit_gradients.watch(row, iteration, carried.h_res, self._chosen(x))
        # A forward that is run again for the backward has been seen.
        if torch._C._current_graph_task_id() != -1:
            return
        # Every schedule runs the first microbatch of a chunk first, so stages see the same tokens.
        first = self._sampled[row] != iteration
        self._sampled[row] = iteration
        if self.settings.alarm != 'off' or (first and due):
            maps = carried.h_post.sum(dtype=torch.float32) + carried.h_res.sum(dtype=torch.float32)
            totals = (x.sum(dtype=torch.float32), maps, y.sum(dtype=torch.float32))
            # A sum is finite if its terms are: no more than one value a tensor is written.
            bad = ~torch.isfinite(torch.stack(totals))
            before = self._bad[row]
            self._bad[row] = bad.long() if before is None else before + bad
        if first and due:
            self._samples[row] = self._sample(self.connections[row], x, carried, y, bias)

    def _chosen(self, x: Tensor) -> Tensor:
        """Numbers of the tokens that are measured, evenly spaced."""
        tokens = x.numel() // x.shape[-1]
        kept = min(self.settings.tokens, tokens)
        return torch.arange(kept, device=x.device) * tokens // kept

    def _sample(
        self,
        connection: HyperConnection,
        x: Tensor,
        carried: ops.Carried,
        y: Tensor,
        bias: Tensor | None,
    ) -> Sample:
        n, chosen = connection.num_streams, self._chosen(x)
        rows = x.reshape(-1, x.shape[-1])[chosen]
        # The kernels do not write H_pre out. Cloned: a static one is a view of a parameter, which
        # the optimizer changes before it is looked at.
        h_pre = connection.all_maps(rows)[0].detach().float().clone()
        streams = rows.float().unflatten(-1, (n, -1))
        output = y.reshape(-1, y.shape[-1])[chosen].float()
        if bias is not None:
            output = output + bias
        logits = connection.res_logits(rows)
        logits = h_pre.new_empty(len(chosen), 0) if logits is None else logits.float()
        return Sample(
            h_pre,
            carried.h_post.reshape(-1, n)[chosen].float(),
            carried.h_res.reshape(-1, n, n)[chosen].float(),
            streams @ streams.transpose(-1, -2) / streams.shape[-1],
            output.square().mean(-1),
            logits,
            torch.zeros_like(logits),
        )

    def after_backward(self) -> None:
        """To be called between the reduction of the gradients and the optimizer's step."""
        if self._watches(self._iteration()):
            self._gradient_squares = self.gradients.squares()

    def take(self) -> tuple[Sample | None, Tensor | None, Tensor | None]:
        """What was noted since the last call, which is then forgotten.

        Returns:
            Samples of all sublayers of this rank, stacked; how often each thing in CHECKED was not
            finite, ``[S, 3]``; and the squared gradient norm of each sublayer's mapping, ``[S]``,
            as its share of a sum over all ranks. None where there was nothing to note.
        """
        complete = bool(self._samples) and None not in self._samples
        sample = Sample(*map(torch.stack, zip(*self._samples, strict=True))) if complete else None
        if sample is not None:
            sample = sample._replace(logit_gradient=self.logit_gradients.of(sample.logits))
        seen = [bad for bad in self._bad if bad is not None]
        bad = torch.stack(seen) if seen and len(seen) == len(self._bad) else None
        squares = self._gradient_squares
        self._clear()
        return sample, bad, squares

    def _clear(self) -> None:
        self._samples: list[Sample | None] = [None] * len(self.connections)
        self._bad: list[Tensor | None] = [None] * len(self.connections)
        self._gradient_squares = None
        self.logit_gradients.forget()

    def detach(self) -> None:
        """Stop watching."""
        for connection in self.connections:
            connection.probe = None
