"""A report as TensorBoard and W&B entries, through Megatron's own writers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.monitor.metrics import OVER_SUBLAYERS
from megatron_mhc.monitor.names import (
    BY_SUBLAYER,
    COMPOSITE,
    FEW_STREAMS,
    H_RES,
    PREFIX,
    ROWS,
    sublayer_name,
)
from megatron_mhc.monitor.reduce import Report


def scalars(report: Report, per_layer: bool) -> dict[str, float]:
    """Tag -> value: over all sublayers, and of each one where asked for."""
    values = {}
    columns = report.metrics | _entries(report) if per_layer else report.metrics
    for name, column in columns.items():
        column = column[report.present]
        values[PREFIX + name] = OVER_SUBLAYERS.get(name, torch.mean)(column).item()
        if per_layer:
            for sublayer, value in zip(report.present.nonzero(), column, strict=True):
                layer = sublayer_name(sublayer.item(), report.pattern).replace(' ', '-')
                values[f'{PREFIX}{name}/{layer}'] = value.item()
    return values


def _entries(report: Report) -> dict[str, Tensor]:
    """``h-res-I-J`` -> ``[L]``: H_res[i, j], mean over tokens; of many streams the diagonal."""
    if report.h_res is None:
        return {}
    n = report.h_res.shape[-1]
    chosen = [(i, j) for i in range(n) for j in range(n) if i == j or n <= FEW_STREAMS]
    return {f'h-res-{i}-{j}': report.h_res[:, i, j] for i, j in chosen}


def write(report: Report, iteration: int, per_layer: bool, writer: Any, wandb_writer: Any) -> None:
    """Write a report; both writers are None except on the last rank.

    Args:
        writer: TensorBoard's ``SummaryWriter``.
        wandb_writer: the ``wandb`` module.
    """
    values = scalars(report, per_layer)
    if wandb_writer is not None:
        wandb_writer.log(values, iteration)
    if writer is None:
        return
    for tag, value in values.items():
        writer.add_scalar(tag, value, iteration)
    if report.h_res is not None and report.composite is not None:
        nothing = torch.full((len(report.h_res),), math.nan)
        rows = torch.stack([report.metrics.get(name, nothing).float() for name in ROWS])
        tensors = ((H_RES, report.h_res), (COMPOSITE, report.composite), (BY_SUBLAYER, rows))
        for tag, tensor in tensors:
            writer.add_tensor(tag, tensor.float(), iteration)
