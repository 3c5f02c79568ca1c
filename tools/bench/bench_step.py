"""A training step of a small GPT with n streams against the standard one, on one CPU thread.

Forward and backward, without the optimizer, which would bring the ratio nearer to 1. Both models
are in one process and take turns, so that a busy machine slows them alike; the time is that of the
CPU, not of the clock on the wall.

    python tools/bench/bench_step.py [--hidden-size 256] [--residual-type mhc]

With --python it takes the time of Python instead: sublayers of mHC on the Triton kernels, whose
launches are recorded and not run.

    python tools/bench/bench_step.py --python [--samples 50]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.refusal import OneLineParser
from megatron_mhc.inputs.values import MOST_WIDTH, integer

VOCABULARY = 256
# Of ``--python``: so many that the first read and the last write hardly count.
SUBLAYERS = 24


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='bench_step.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--hidden-size', type=integer(16, MOST_WIDTH), default=256, help='C, a multiple of 64')
    add('--num-layers', type=integer(1, 64), default=2)
    add('--seq-length', type=integer(1, 4096), default=128)
    add('--micro-batch-size', type=integer(1, 64), default=4)
    add('--residual-type', choices=['hc', 'mhc'], default='mhc')
    add('--num-streams', type=integer(1, 16), default=4)
    add('--samples', type=integer(1, 1000), default=7, help='steps of each, after one to warm up')
    add('--python', action='store_true', help='Python of a sublayer on the kernels, no step')
    options = parser.parse_args(argv)
    if options.hidden_size > 64 and options.hidden_size % 64:
        parser.error(
            f'--hidden-size {options.hidden_size}: attention has heads of 64; give a multiple of 64'
        )
    return options


def build(options: argparse.Namespace, residual: str | None) -> Any:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc import ResidualConfig

    config = TransformerConfig(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=max(1, options.hidden_size // 64),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization='RMSNorm',
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    if residual is not None:
        config.residual_config = ResidualConfig(
            residual_type=residual, num_residual_streams=options.num_streams, kernel_backend='torch'
        )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization='RMSNorm'),
        vocab_size=VOCABULARY,
        max_sequence_length=options.seq_length,
        position_embedding_type='rope',
    )


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of every step, by the model's residual type."""
    import torch

    torch.set_num_threads(1)
    models = {kind: build(options, kind) for kind in (None, options.residual_type)}
    tokens = torch.randint(0, VOCABULARY, (options.micro_batch_size, options.seq_length + 1))
    positions = torch.arange(options.seq_length).expand(options.micro_batch_size, -1)
    mask = torch.ones(1, 1, options.seq_length, options.seq_length).triu(1).bool()
    seconds: dict[str, list[float]] = {str(kind): [] for kind in models}
    for _ in range(options.samples + 1):
        for kind, model in models.items():
            start = time.process_time()
            loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous())
            loss.mean().backward()
            seconds[str(kind)].append(time.process_time() - start)
            model.zero_grad(set_to_none=True)
    return {kind: times[1:] for kind, times in seconds.items()}


def python_of_sublayers(options: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds of one sublayer's Python, by direction, and its launches.

    ``SUBLAYERS`` in a row with fused edges, as the layers call them, and what autograd does for
    them. A launch itself is Triton's time and not counted, nor are values: memory is left as it is.
    """
    # Kernels that are interpreted take tensors on the CPU; none of them runs here.
    os.environ['TRITON_INTERPRET'] = '1'
    import torch

    from megatron_mhc import ResidualConfig
    from megatron_mhc.kernels.triton.launch import record_launches
    from megatron_mhc.residual.hyper_connection import Pending
    from megatron_mhc.residual.mhc import ManifoldHyperConnection

    torch.set_num_threads(1)
    settings = ResidualConfig(num_residual_streams=options.num_streams, kernel_backend='triton')
    channels = options.hidden_size
    rooms = [ManifoldHyperConnection(channels, settings, place) for place in range(SUBLAYERS)]
    shape = options.seq_length, options.micro_batch_size
    # Each its own output of a sublayer: sums of their gradients would count here.
    x, *ys = (
        torch.empty(*shape, width, dtype=torch.bfloat16, requires_grad=True)
        for width in (options.num_streams * channels, *SUBLAYERS * [channels])
    )
    found: dict[str, list[float]] = {'forward': [], 'backward': [], 'launches': []}
    for _ in range(options.samples + 1):
        with record_launches() as launches:
            start = time.process_time()
            _, u, carried = rooms[0](x)
            outputs = [u]
            for room, y in zip(rooms[1:], ys, strict=False):
                _, u, carried = room(Pending(y, carried))
                outputs.append(u)
            outputs.append(rooms[-1].post(ys[-1], carried))
            middle = time.process_time()
            torch.autograd.backward(outputs, [torch.empty_like(one) for one in outputs])
            end = time.process_time()
        spent = middle - start, end - middle
        for key, value in zip(found, (*(1e6 * s for s in spent), len(launches)), strict=True):
            found[key].append(value / SUBLAYERS)
        for tensor in (x, *ys, *(p for room in rooms for p in room.parameters())):
            tensor.grad = None
    return {key: values[1:] for key, values in found.items()}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.python:
        found = python_of_sublayers(options)
        print(
            f'n = {options.num_streams}, Python of a sublayer: '
            + ', '.join(
                f'{way} {statistics.median(found[way]):.0f} us (fastest {min(found[way]):.0f})'
                for way in ('forward', 'backward')
            )
            + f'; {found["launches"][0]:.1f} launches, recorded and not run'
        )
        return 0
    import torch

    from megatron_mhc.runtime import cpu_device

    # Before anything imports Megatron.
    cpu_device.install()
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.patches.registry import RESIDUAL_PATCHES

    engine.apply(CPU_DEVICE_PATCHES)
    from megatron.core import parallel_state, tensor_parallel

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{Path(folder) / "store"}', rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        engine.apply(RESIDUAL_PATCHES)
        standard, ours = measure(options).values()
        torch.distributed.destroy_process_group()
    pairs = [b / a for a, b in zip(standard, ours, strict=True)]
    print(
        f'C = {options.hidden_size}, T = {options.seq_length * options.micro_batch_size}, '
        f'{options.num_layers} layers: standard {statistics.median(standard):.3f} s, '
        f'{options.residual_type} {statistics.median(ours):.3f} s, '
        f'ratio {statistics.median(pairs):.2f} (median of {len(pairs)}; '
        f'{min(pairs):.2f} to {max(pairs):.2f}; of the fastest of each '
        f'{min(ours) / min(standard):.2f})'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
