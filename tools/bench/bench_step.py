"""A training step of a small GPT with n streams against the standard one, on one CPU thread.

Forward and backward, without the optimizer, which would bring the ratio nearer to 1. Both models
are in one process and take turns, so that a busy machine slows them alike; the time is that of the
CPU, not of the clock on the wall.

    python tools/bench/bench_step.py [--hidden-size 256] [--residual-type mhc]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.refusal import OneLineParser
from megatron_mhc.inputs.values import MOST_WIDTH, integer

VOCABULARY = 256


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


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
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
