"""Patch of the emulated CPU device: Megatron's argument parser.

It makes an unmodified command line run on the CPU by changing defaults, and refuses in one line, as
soon as the values are known, what the user asked for explicitly and the CPU cannot do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_mhc.patches.cpu_pattern import announce_slow_layers
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.hybrid_pattern import pattern_of
from megatron_mhc.patches.parse_hook import after_parsing
from megatron_mhc.settings.hybrid_stages import LAYERS

# ``megatron_mhc.runtime.cpu_device.NOTICE`` names these to the user.
DEFAULTS = {
    'transformer_impl': 'local',
    'distributed_backend': 'gloo',
    'gradient_accumulation_fusion': False,
    'no_persist_layer_norm': True,
    'apply_rope_fusion': False,
    'masked_softmax_fusion': False,
}

# argument -> (flag, accepted values, why, remedy)
LIMITS = {
    'transformer_impl': (
        '--transformer-impl',
        ('local',),
        'Transformer Engine needs CUDA',
        'leave the flag out',
    ),
    'distributed_backend': (
        '--distributed-backend',
        ('gloo',),
        'gloo is the only backend for CPU tensors here',
        'leave the flag out',
    ),
    'context_parallel_size': (
        '--context-parallel-size',
        (1,),
        "context parallelism exists only in Transformer Engine's attention",
        'use 1, or a --spec with an attention of your own',
    ),
    'fp8': ('--fp8-format', (None,), 'fp8 needs Transformer Engine', 'use --bf16 or fp32'),
    'fp4': ('--fp4-format', (None,), 'fp4 needs Transformer Engine', 'use --bf16 or fp32'),
    'tp_comm_overlap': (
        '--tp-comm-overlap',
        (False,),
        'its communication buffers belong to Transformer Engine',
        'leave the flag out',
    ),
    'cuda_graph_impl': (
        '--cuda-graph-impl',
        ('none',),
        'there is no CUDA to capture',
        'leave the flag out',
    ),
    'enable_cuda_graph': (
        '--enable-cuda-graph',
        (False,),
        'there is no CUDA to capture',
        'leave the flag out',
    ),
    'external_cuda_graph': (
        '--external-cuda-graph',
        (False,),
        'there is no CUDA to capture',
        'leave the flag out',
    ),
}


def check_limits(namespace: argparse.Namespace, unknown: list[str]) -> None:
    """Raise ValueError, naming flag, reason and remedy, for what the CPU device cannot run."""
    for name, (flag, accepted, reason, remedy) in LIMITS.items():
        value = getattr(namespace, name, accepted[0])
        own_attention = name == 'context_parallel_size' and getattr(namespace, 'spec', None)
        if value not in accepted and not own_attention:
            raise ValueError(f'{flag} {value}: not on the CPU device, {reason}; {remedy}.')
    pattern, split = (
        pattern_of(namespace) or '',
        getattr(namespace, 'tensor_model_parallel_size', 1),
    )
    latent = next((symbol for symbol in '+D' if symbol in pattern), None)
    if latent is not None and split > 1:
        raise ValueError(
            f'--tensor-model-parallel-size {split}: not on the CPU device with '
            f"--hybrid-layer-pattern {pattern}, for Megatron's local layers of '{latent}' "
            f'({LAYERS[latent]}) leave the gradient of the part of keys that heads share to each '
            'rank; use 1.'
        )
    announce_slow_layers(pattern)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args, **kwargs):
        parser = original(parser, *args, **kwargs)
        parser.set_defaults(**DEFAULTS)
        after_parsing(parser, check_limits)
        return parser

    return add_megatron_arguments


CPU_ARGUMENTS_PATCH = Patch(
    id='cpu-arguments',
    target='megatron.training.arguments:add_megatron_arguments',
    wrap=_wrap,
    reason='stock defaults name NCCL, Transformer Engine and fused CUDA kernels',
    fingerprints=on_every_release('6904cd4c'),
    reads=('parser',),
)
