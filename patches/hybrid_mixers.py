"""What Mamba, gated delta net and expert layers of a pattern need, before a model is built.

Megatron says so by errors of every rank, of some only while it trains.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Iterator

from megatron_mhc.compat import core_version
from megatron_mhc.inputs.values import flag_of
from megatron_mhc.patches.hybrid_pattern import pattern_of
from megatron_mhc.runtime import cpu_device
from megatron_mhc.settings.hybrid_stages import LAYERS

# Symbol -> where Megatron notes whether it has the kernels, and how to get them.
KERNELS = {
    'M': ('ssm.mamba_mixer', 'HAVE_MAMBA_SSM', 'mamba_ssm', 'mamba-ssm causal-conv1d'),
    'G': ('ssm.gated_delta_net', 'HAVE_FLA', 'fla', 'flash-linear-attention'),
    'D': (
        'transformer.experimental_attention_variant.dsa',
        'hadamard_transform',
        'fast_hadamard_transform',
        'fast-hadamard-transform',
    ),
}


def check_mixers(args: argparse.Namespace) -> None:
    """Raise ValueError for a layer that Megatron cannot build or run as the pattern has it.

    A ``standard`` run is told as well: nothing is lost but a traceback of every rank. Another stack
    spec may have other layers for these symbols.
    """
    pattern, spec = pattern_of(args) or '', getattr(args, 'spec', None)
    if spec is not None and not str(spec[0]).startswith('megatron.core.'):
        return
    flag = f'--hybrid-layer-pattern {pattern}'
    for symbol in KERNELS:
        # From 0.19 the rotation that it is for may be left out.
        rotates = symbol != 'D' or getattr(args, 'dsa_indexer_rotate_activation', True)
        if symbol in pattern and rotates:
            _require_packages(symbol, f"{flag}: '{symbol}' ({LAYERS[symbol]})")
    _check_latent(pattern, flag, args)
    if 'E' in pattern and not args.num_experts:
        raise ValueError(
            f"{flag}: 'E' ({LAYERS['E']}) needs --num-experts; say how many, or leave 'E' out"
        )
    silu = args.swiglu or getattr(args, 'deterministic_mode', False)
    if 'G' in pattern and not silu and not (core_version() or '').startswith('0.17'):
        raise ValueError(
            f"{flag}: the convolution of 'G' ({LAYERS['G']}) takes the model's activation, and "
            'its kernel has silu alone; add --swiglu'
        )
    for dividend, value, divisor, by in _sizes(pattern, args):
        if value and by and value % by:
            raise ValueError(
                f'{flag}: {dividend} {value} does not divide by {divisor} {by}; change one of them'
            )


def _check_latent(pattern: str, flag: str, args: argparse.Namespace) -> None:
    """Raise ValueError for latent and sparse attention without what they are made of."""
    for symbol in '+D':
        if symbol in pattern and not args.multi_latent_attention:
            raise ValueError(
                f"{flag}: '{symbol}' ({LAYERS[symbol]}) needs --multi-latent-attention; add it"
            )
    if 'D' not in pattern:
        return
    for name in ('dsa_indexer_n_heads', 'dsa_indexer_head_dim', 'dsa_indexer_topk'):
        if not getattr(args, name, None):
            raise ValueError(f"{flag}: 'D' ({LAYERS['D']}) needs {flag_of(name)}; say how many")
    older = (core_version() or '').startswith(('0.17', '0.18'))
    if args.add_bias_linear and not older:
        raise ValueError(f"{flag}: 'D' ({LAYERS['D']}) has no biases; add --disable-bias-linear")


def _require_packages(symbol: str, layer: str) -> None:
    """Raise ValueError for the first one that cannot be imported."""
    if symbol == 'M' and importlib.util.find_spec('einops') is None:
        raise ValueError(f'{layer} needs the package einops; pip install einops')
    module, known, package, install = KERNELS[symbol]
    layers = importlib.import_module(f'megatron.core.{module}')
    if not cpu_device.is_installed() and not getattr(layers, known, True):
        raise ValueError(
            f'{layer} needs the package {package}, which cannot be imported here; pip install '
            f"{install}, or leave '{symbol}' out"
        )


def _sizes(
    pattern: str, args: argparse.Namespace
) -> Iterator[tuple[str, int | None, str, int | None]]:
    """Flag and value of what must be a multiple, and of what."""
    ranks = '--tensor-model-parallel-size', args.tensor_model_parallel_size
    if 'M' in pattern:
        heads, groups = args.mamba_num_heads, args.mamba_num_groups
        if not heads:
            inner = 2 * args.hidden_size
            yield 'twice --hidden-size,', inner, '--mamba-head-dim', args.mamba_head_dim
            heads = inner // args.mamba_head_dim
        yield 'the number of Mamba heads,', heads, '--mamba-num-groups', groups
        yield '--mamba-num-groups', groups, *ranks
    if 'G' in pattern:
        keys = '--linear-num-key-heads', args.linear_num_key_heads
        yield '--linear-num-value-heads', args.linear_num_value_heads, *keys
        yield *keys, *ranks
