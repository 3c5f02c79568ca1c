"""Say at start which kernels a run will use, and refuse a demand that they cannot meet.

The same rules decide at each call (``megatron_mhc.kernels.backend``); here they are asked before
anything is built.
"""

from __future__ import annotations

import argparse

import torch

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.kernels.backend import kernel_obstacle, numerics_obstacle
from megatron_mhc.kernels.numerics import PAPER
from megatron_mhc.runtime import cpu_device
from megatron_mhc.settings.residual import MAPPINGS, ResidualConfig


def announce_kernels(args: argparse.Namespace, residual: ResidualConfig) -> None:
    """Print one line about the ops of this run, on the first rank.

    Raises:
        ValueError: ``--mhc-kernel-backend triton`` where the kernels cannot run.
    """
    if not residual.has_streams:
        return
    on_gpu = torch.cuda.is_available() and not cpu_device.is_installed()
    device = torch.device('cuda' if on_gpu else 'cpu')
    dtype, n = _stream_dtype(args), residual.num_residual_streams
    obstacle = kernel_obstacle(device, dtype, n)
    if residual.kernel_backend == 'triton' and obstacle:
        raise ValueError(
            f'--mhc-kernel-backend triton: {obstacle}; use auto, which then takes torch'
        )
    if residual.projection_precision == 'bf16x2' and dtype != torch.bfloat16:
        raise ValueError(
            f'--mhc-projection-precision bf16x2: it needs bf16 streams, these are {dtype}; use '
            'auto or --bf16'
        )
    if residual.kernel_backend == 'torch':
        choice = 'torch reference, as --mhc-kernel-backend torch asks'
    elif residual.kernel_backend == 'auto' and not on_gpu:
        choice = 'torch reference, because the streams are on the CPU'
    elif obstacle:
        choice = f'torch reference, because {obstacle}'
    else:
        choice = 'Triton kernels' if on_gpu else 'Triton kernels, interpreted: slow'
    # Of other conventions some ops are torch's on every device.
    takes = choice.startswith('Triton')
    whys = {op: takes and numerics_obstacle(op, residual.numerics) for op in ops_of(residual)}
    streams = f'({str(dtype).removeprefix("torch.")}, n = {n})'
    for op, why in whys.items():
        if why:
            announce(f'{op} {streams}: torch reference, because {why}')
    if names := ', '.join(op for op, why in whys.items() if not why):
        announce(f'{names} {streams}: {choice}')


def ops_of(residual: ResidualConfig) -> tuple[str, ...]:
    """The ops of ``megatron_mhc.ops`` that the sublayers call."""
    if residual.residual_type == 'gated':
        return ('post_res',)
    if residual.residual_type == 'hc' or set(residual.fixed_mappings) == set(MAPPINGS):
        return 'pre', 'post_res'
    if residual.manifold != 'sinkhorn':
        return 'pre', 'post_res'
    if residual.fixed_mappings or residual.single_pass or residual.numerics != PAPER:
        return 'mapping', 'pre', 'post_res'
    return ('read', 'write', 'write_read') if residual.edge_fusion else ('read', 'write')


def _stream_dtype(args: argparse.Namespace) -> torch.dtype:
    if getattr(args, 'fp32_residual_connection', False):
        return torch.float32
    if getattr(args, 'bf16', False):
        return torch.bfloat16
    return torch.float16 if getattr(args, 'fp16', False) else torch.float32
