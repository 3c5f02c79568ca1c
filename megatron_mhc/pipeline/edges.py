"""What travels between pipeline stages: its shape, its type and the ranks at both ends."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mhc.residual.attention import block_sums_of
from megatron_mhc.schedules.executor_channels import Transport
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.settings.flags_residual import parsed_arguments
from megatron_mhc.settings.model_config import ENGRAM, RESIDUAL
from megatron_mhc.settings.residual import ResidualConfig


def transport_for(
    config: Any, plan: Plan, group: dist.ProcessGroup, sequence: int, micro_batch_size: int
) -> Transport:
    """The transport of this rank.

    Args:
        config: the model's config.
        plan: what will run.
        group: the pipeline-parallel group.
        sequence: tokens of a sequence on this context-parallel rank.
        micro_batch_size: sequences of a microbatch, b.
    """
    if config.sequence_parallel:
        sequence //= parallel_state.get_tensor_model_parallel_world_size()
    shape = torch.Size((sequence, micro_batch_size, edge_width(config)))
    negotiated = shapes_are_negotiated(config)
    return Transport(
        plan,
        group.rank(),
        dist.get_process_group_ranks(group),
        group,
        lambda op: None if negotiated else shape,
        config.pipeline_dtype,
        own_device(),
        timeout=default_timeout(),
    )


def own_device() -> torch.device:
    """Where this process has its tensors."""
    return torch.device(torch.cuda.current_device() if torch.cuda.is_available() else 'cpu')


def edge_width(config: Any) -> int:
    """Values a token in a message between two stages: n*C, and what a topology sends with them."""
    residual, engram = RESIDUAL.peek(config), ENGRAM.peek(config)
    streams = 1 if residual is None else _streams(config, residual)
    width: int = streams * config.hidden_size
    if residual is not None and residual.single_pass:
        width += residual.edge_values(config.pipeline_dtype.itemsize)
    if engram is not None:
        width += engram.edge_values(config.pipeline_dtype.itemsize)
    return width


def is_stock(config: Any) -> bool:
    """Whether the messages of this model are those of Megatron."""
    residual = RESIDUAL.peek(config)
    return ENGRAM.peek(config) is None and (residual is None or not residual.enabled)


def _streams(config: Any, residual: ResidualConfig) -> int:
    return block_sums_of(config, residual) or residual.streams


def describe_edge(config: Any) -> str:
    """What such a message has, in words."""
    residual = RESIDUAL.peek(config) or ResidualConfig('standard')
    beside = ' and H_pre' if residual.single_pass else ''
    beside += '' if ENGRAM.peek(config) is None else ' and token ids'
    what = 'block sums' if residual.residual_type == 'attention' else 'streams'
    return f'{_streams(config, residual)} {what} of {config.hidden_size}{beside}'


def default_timeout() -> datetime.timedelta:
    """As long as Megatron's own groups wait: ``--distributed-timeout-minutes``."""
    minutes = getattr(parsed_arguments(), 'distributed_timeout_minutes', None) or 10
    return datetime.timedelta(minutes=minutes)


def shapes_are_negotiated(config: Any) -> bool:
    """Whether the communicator exchanges shapes before each message and needs no width from us."""
    return bool(config.variable_seq_lengths or getattr(config, 'mtp_standalone', False))
