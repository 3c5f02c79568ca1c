"""The saved arguments of the same run with the other class of model, GPT or hybrid."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from megatron_mhc.checkpoints.check import FOREIGN
from megatron_mhc.convert.pattern import (
    FLAG,
    Pattern,
    parsed,
    pattern_of,
    require_gpt_layers,
    symbols_of_gpt,
)
from megatron_mhc.convert.stages import ENDS, GPT_ALONE, gpt_flags, stages_of_gpt
from megatron_mhc.inputs.values import flag_of

# What a GPT model has and a hybrid one has not, or counts by the number of its layer.
GPT_FEATURES = {
    'use_rope_scaling': 'a HybridModel has no scaled rotary embedding',
    'no_rope_freq': 'it counts layers, of which a hybrid model has twice as many',
    'window_attn_skip_freq': 'it counts layers, of which a hybrid model has twice as many',
    'apply_query_key_layer_scaling': 'it scales by the number of a layer, which another one gets',
    'heterogeneous_layers_config_path': 'a pattern has one size for all layers of a symbol',
    'experimental_attention_variant': 'its attention has another symbol and other weights',
    'linear_attention_freq': 'its attention has another symbol and other weights',
}
# What only a layer spec of one's own could have.
SPEC_FEATURES = {
    'qk_layernorm': "Megatron's stack spec has no norms of queries and keys",
    'qk_l2_norm': "Megatron's stack spec has no norms of queries and keys",
    'spec': 'nothing tells what layers of one own spec are in the other class of model',
}
POSITIONS = ('learned_absolute', 'rope', 'yarn', 'none')
STOCK_STACKS = ('mamba_stack_spec', 'hybrid_stack_spec')


def moved_args(args: argparse.Namespace, to: str, unchecked: bool = False) -> argparse.Namespace:
    """``hybrid_args`` or ``gpt_args``, as ``to`` says."""
    return (hybrid_args if to == 'hybrid' else gpt_args)(args, unchecked)


def hybrid_args(args: argparse.Namespace, unchecked: bool = False) -> argparse.Namespace:
    """The arguments of the hybrid model that computes what this GPT model does.

    Args:
        unchecked: allow what only a layer spec of one's own could have.

    Raises:
        ValueError: it has something that a hybrid model has not.
    """
    if pattern_of(args):
        raise ValueError(f'--to hybrid: it is a hybrid model already, {FLAG} {pattern_of(args)}')
    _check_residual(args)
    for name, why in GPT_FEATURES.items() | ({} if unchecked else SPEC_FEATURES).items():
        if value := getattr(args, name, None):
            shown = '' if value is True else f' {value}'
            raise ValueError(f'--to hybrid: it was trained with {flag_of(name)}{shown}, and {why}')
    if getattr(args, 'position_embedding_type', 'rope') not in POSITIONS:
        raise ValueError(
            f'--to hybrid: it was trained with --position-embedding-type '
            f'{args.position_embedding_type}, which a HybridModel has not'
        )
    symbols = symbols_of_gpt(args)
    _require_symbols(symbols)
    stages = stages_of_gpt(args)
    lengths = (len(symbols),) if stages is None else tuple(2 * count for count in stages)
    depths = (symbols[-2:],) * (getattr(args, 'mtp_num_layers', None) or 0)
    ends = {name: getattr(args, name, None) for name in ENDS}
    return _replaced(
        args,
        GPT_ALONE
        | {name: 2 * count if count and stages is None else None for name, count in ends.items()}
        | {
            'hybrid_layer_pattern': str(Pattern(symbols, lengths, depths)),
            'num_layers': len(symbols),
            'encoder_num_layers': len(symbols),
            'moe_layer_freq': 1,
            'spec': None,
        },
    )


def gpt_args(args: argparse.Namespace, unchecked: bool = False) -> argparse.Namespace:
    """The arguments of the GPT model that computes what this hybrid model does.

    Raises:
        ValueError: its pattern has a layer that no GPT model has.
    """
    pattern = pattern_of(args)
    if not pattern:
        raise ValueError(f'--to gpt: it has no {FLAG}, so it is no hybrid model')
    _check_residual(args)
    require_gpt_layers(pattern)
    spec = getattr(args, 'spec', None)
    if spec and not unchecked and spec[-1] not in STOCK_STACKS:
        raise ValueError(
            f'--to gpt: it was trained with --spec {spec}, and {SPEC_FEATURES["spec"]}'
        )
    layers, stages, depths = parsed(pattern)
    experts = [int(symbol == 'E') for symbol in layers[1::2]]
    mixed = getattr(args, 'num_experts', None) and not all(experts)
    return _replaced(
        args,
        gpt_flags(args, stages, len(depths))
        | {
            'hybrid_layer_pattern': None,
            'hybrid_override_pattern': None,
            'num_layers': len(experts),
            'encoder_num_layers': len(experts),
            'moe_layer_freq': experts if mixed else 1,
            'multi_latent_attention': '+' in layers,
            'spec': None,
        },
    )


def _check_residual(args: argparse.Namespace) -> None:
    """Raise ValueError for what a converted model would not compute with the same weights."""
    for name in FOREIGN:
        if getattr(args, name, False):
            raise ValueError(
                f"it was trained with Megatron-LM's own {name}, which no released model has; "
                'first --to mhc'
            )
    if getattr(args, 'engram_layers', None):
        raise ValueError(
            'it has a memory (--engram-layers), whose tables are hashed by the number of their '
            'layer, which another one gets: every n-gram would read another row'
        )


def _require_symbols(symbols: str) -> None:
    from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols

    for symbol in symbols:
        if symbol not in Symbols.VALID_LAYERS:
            raise ValueError(
                f'--to hybrid: its latent attention is {symbol!r} in a pattern, which this '
                'megatron-core does not have; convert it with 0.19 or newer'
            )


def _replaced(args: argparse.Namespace, values: dict[str, Any]) -> argparse.Namespace:
    """A copy with ``values`` of the arguments that it has, and those that make the class."""
    new = copy.copy(args)
    for name, value in values.items():
        if hasattr(args, name) or name == 'hybrid_layer_pattern':
            setattr(new, name, value)
    return new
