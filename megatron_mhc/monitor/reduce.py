"""From what each rank noted to one report, the same on every rank.

Rows of tables are the sublayers of the whole model. A rank fills in its own and leaves zeros, so
that one sum over all ranks serves pipeline stages and virtual stages in any order, replicas, and
the token parts of sequence and context parallelism. Means are weighted by tokens; ranks that hold
the same tokens count alike and do not change them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce

from megatron_mhc.monitor.collect import Monitor
from megatron_mhc.monitor.metrics import (
    COMPOSITE_MEANS,
    MAXIMA,
    MEANS,
    MINIMA,
    OF_LOGITS,
    Sample,
    composites,
    maxima,
    sums,
)
from megatron_mhc.monitor.names import CHECKED


@dataclass(frozen=True)
class Report:
    """What was measured of every sublayer, on the host.

    Args:
        metrics: name -> ``[L]``; without the sampled ones where no step was sampled.
        h_res: ``[L, n, n]``, the mean over the tokens; None without samples.
        composite: the same of ``H[L-1] ... H[l]``.
        pipeline_rank: ``[L]``, who holds the sublayer; -1 where there is none (half layers).
        pattern: the layers of a hybrid model.
    """

    metrics: dict[str, Tensor]
    h_res: Tensor | None
    composite: Tensor | None
    pipeline_rank: Tensor
    pattern: str = ''

    @property
    def present(self) -> Tensor:
        """Whether each of the L sublayers exists."""
        return self.pipeline_rank >= 0


def gather(
    monitor: Monitor,
    layers: int,
    streams: int,
    sampled: bool,
    loss_scale: float,
    microbatches: int = 1,
    pattern: str = '',
) -> Report:
    """Reduce what all ranks noted; collective, and the one place that waits for the device.

    Args:
        monitor: this rank's; what it noted is taken.
        layers: decoder layers of the whole model, two sublayers each.
        streams: n.
        sampled: whether the step that ended was one to report, the same on every rank.
        loss_scale: what the gradients were multiplied by.
        microbatches: what the loss of each was divided by.
        pattern: the layers of a hybrid model.
    """
    device, length, n = monitor.device, 2 * layers, streams
    rows = torch.tensor(monitor.sublayers, dtype=torch.long, device=device)
    sample, bad, squares = monitor.take()

    def placed(width: int, values: Tensor | None, fill: float = 0.0) -> Tensor:
        table = torch.full((length, width), fill, dtype=torch.float64, device=device)
        if values is not None:
            table[rows] = values.double().reshape(len(rows), width).to(device)
        return table

    def ones(value: float) -> Tensor:
        return torch.full((len(rows), 1), value, device=device)

    stage = parallel_state.get_pipeline_model_parallel_rank()
    # Every rank of a stage holds the sublayer, hence the number of holders beside it.
    tables = [placed(1, ones(1.0)), placed(1, ones(stage)), placed(3, bad), placed(1, squares)]
    names = [*MEANS, *COMPOSITE_MEANS]
    widths = [1, 1, len(CHECKED), 1]
    if sampled:
        measured = None
        composite = _composites(monitor, sample, rows, length, n, device)
        if sample is not None and composite is not None:
            tokens = ones(sample.h_res.shape[1])
            measured = torch.cat([tokens, sums(sample, composite)], -1)
        widths += [1, len(names), n * n, n * n]
        tables.append(placed(sum(widths[4:]), measured))
        largest = placed(len(MAXIMA), maxima(sample) if sample else None, -math.inf)
        all_reduce(largest, ReduceOp.MAX)
    table = torch.cat(tables, -1)
    all_reduce(table)
    holders, ranks, bad, squares, *sampled_parts = table.cpu().split(widths, -1)
    pipeline_rank = torch.where(holders > 0, ranks / holders.clamp(min=1), -1).flatten().long()
    metrics = {f'nonfinite-{name}': bad[:, i] for i, name in enumerate(CHECKED)}
    metrics['mapping-grad-norm'] = squares.flatten().sqrt() / loss_scale
    if not sampled or not (sampled_parts[0] > 0).any():
        return Report(metrics, None, None, pipeline_rank, pattern)
    tokens, means, h_res, composite = sampled_parts
    metrics |= dict(zip(names, (means / tokens).unbind(-1), strict=True))
    for name, column in zip(MAXIMA, largest.cpu().unbind(-1), strict=True):
        metrics[name] = -column if name in MINIMA else column
    metrics['res-logit-grad-max'] *= microbatches / loss_scale
    if (metrics['res-logit-max'] == -math.inf).all():
        metrics = {name: column for name, column in metrics.items() if name not in OF_LOGITS}
    return Report(
        metrics,
        (h_res / tokens).unflatten(-1, (n, n)),
        (composite / tokens).unflatten(-1, (n, n)),
        pipeline_rank,
        pattern,
    )


def _composites(
    monitor: Monitor, sample: Sample | None, rows: Tensor, length: int, n: int, device: torch.device
) -> Tensor | None:
    """Products of this rank's tokens over the sublayers of all stages: ``[S, K, n, n]``.

    The pipeline ranks hold different sublayers of the same tokens.
    """
    # Of sublayers that no stage has the product must not know.
    present = torch.zeros(length, 1, device=device)
    present[rows] = 1
    wanted = monitor.settings.tokens
    single = torch.zeros(length, wanted * n * n, device=device)
    if sample is not None:
        kept = sample.h_res.shape[1]
        single[rows, : kept * n * n] = sample.h_res.flatten(1)
    whole = torch.cat([present, single], -1)
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        all_reduce(whole, group=group)
    single = whole[:, 1:].unflatten(-1, (wanted, n, n))
    single = torch.where(whole[:, :1, None, None] > 0, single, torch.eye(n, device=device))
    return None if sample is None else composites(single)[rows, :kept]
