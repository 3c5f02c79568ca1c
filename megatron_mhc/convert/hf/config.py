"""From a run's saved arguments to the configuration that transformers reads, and back."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from megatron_mhc.convert.pattern import pattern_of, require_gpt_layers
from megatron_mhc.convert.saved_args import norm_eps_of
from megatron_mhc.settings.flag import write_back
from megatron_mhc.settings.flags_residual import saved_residual_config
from megatron_mhc.settings.residual import ResidualConfig

MODEL_TYPE = 'megatron_mhc'
MODELING = 'modeling_megatron_mhc'
# Under which names Megatron saved the weights; other models have none.
METADATA = 'megatron_content_metadata'
AUTO_MAP = {
    'AutoConfig': f'{MODELING}.MegatronMhcConfig',
    'AutoModelForCausalLM': f'{MODELING}.MegatronMhcForCausalLM',
}
# Ours -> Megatron's argument of the same meaning.
SAME = {
    'vocab_size': 'padded_vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'ffn_hidden_size',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_attention_heads',
    'num_key_value_heads': 'num_query_groups',
    'head_dim': 'kv_channels',
    'max_position_embeddings': 'max_position_embeddings',
    'position_embedding_type': 'position_embedding_type',
    'rope_interleaved': 'rotary_interleaved',
    'normalization': 'normalization',
    'norm_eps': 'layernorm_epsilon',
    'qk_norm': 'qk_layernorm',
    'gated_mlp': 'swiglu',
    'attention_bias': 'add_bias_linear',
    'mlp_bias': 'add_bias_linear',
    'attention_dropout': 'attention_dropout',
    'residual_in_fp32': 'fp32_residual_connection',
}
EXPERTS = {
    'num_experts': 'num_experts',
    'experts_per_token': 'moe_router_topk',
    'expert_intermediate_size': 'moe_ffn_hidden_size',
    'shared_expert_intermediate_size': 'moe_shared_expert_intermediate_size',
    'shared_expert_gate': 'moe_shared_expert_gate',
    'router_score': 'moe_router_score_function',
    'router_pre_softmax': 'moe_router_pre_softmax',
    'router_scaling_factor': 'moe_router_topk_scaling_factor',
    'router_bias': 'moe_router_enable_expert_bias',
    'router_groups': 'moe_router_num_groups',
    'router_group_topk': 'moe_router_group_topk',
    'router_dtype': 'moe_router_dtype',
}
LATENT = {
    'q_lora_rank': 'q_lora_rank',
    'kv_lora_rank': 'kv_lora_rank',
    'qk_head_dim': 'qk_head_dim',
    'head_dim': 'qk_pos_emb_head_dim',
    'v_head_dim': 'v_head_dim',
}
# Its scaling of RoPE: ours -> Megatron's argument, and what no argument of Megatron's says.
YARN = {
    'factor': 'rotary_scaling_factor',
    'mscale': 'mscale',
    'mscale_all_dim': 'mscale_all_dim',
}
YARN_CONSTANTS = {
    'rope_type': 'yarn',
    'original_max_position_embeddings': 4096,
    'beta_fast': 32.0,
    'beta_slow': 1.0,
}
# Ours -> field of ``ResidualConfig``.
RESIDUAL = {
    'residual_type': 'residual_type',
    'num_residual_streams': 'num_residual_streams',
    'stream_merge': 'stream_merge',
    'residual_norm_eps': 'norm_eps',
    'numerics': 'numerics',
    'fixed_mappings': 'fixed_mappings',
    'manifold': 'manifold',
    'sinkhorn_iterations': 'sinkhorn_iterations',
    'single_pass': 'single_pass',
    'hc_variant': 'hc_variant',
    'hc_tanh': 'hc_tanh',
    'gated_rank': 'gated_rank',
    'attention_block_size': 'attention_block_size',
}
MANIFOLDS = ('sinkhorn', 'permutation', 'kronecker', 'orthogonal', 'diagonal', 'identity')
POSITIONS = ('rope', 'learned_absolute', 'none')
# The scaling of Llama 3, whose other three values are constants in Megatron.
LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
}
# Argument -> flag, and the values under which a model has a form here.
ONLY: dict[str, tuple[str, tuple[Any, ...]]] = {
    'hybrid_layer_pattern': ('--hybrid-layer-pattern', (None,)),
    'hybrid_override_pattern': ('--hybrid-override-pattern', (None,)),
    'spec': ('--spec', (None,)),
    'heterogeneous_layers_config_path': ('--heterogeneous-layers-config-path', (None,)),
    'heterogeneous_layers_config_encoded_json': (
        '--heterogeneous-layers-config-encoded-json',
        (None,),
    ),
    'engram_layers': ('--engram-layers', (None, [], ())),
    'experimental_attention_variant': ('--experimental-attention-variant', (None,)),
    'linear_attention_freq': ('--linear-attention-freq', (None,)),
    'attention_output_gate': ('--attention-output-gate', (False,)),
    'softmax_type': ('--softmax-type', ('vanilla',)),
    'window_size': ('--window-size', (None,)),
    'qk_l2_norm': ('--qk-l2-norm', (False,)),
    'no_rope_freq': ('--no-rope-freq', (None,)),
    'rotary_seq_len_interpolation_factor': ('--rotary-seq-len-interpolation-factor', (None,)),
    'rope_scaling_factor': ('--rope-scaling-factor', (8.0,)),
    'layernorm_zero_centered_gamma': ('--apply-layernorm-1p', (False,)),
    'apply_layernorm_1p': ('--apply-layernorm-1p', (False,)),
    'apply_residual_connection_post_layernorm': (
        '--apply-residual-connection-post-layernorm',
        (False,),
    ),
    'quick_geglu': ('--quick-geglu', (False,)),
    'openai_gelu': ('--openai-gelu', (False,)),
    'glu_linear_offset': ('--glu-linear-offset', (0.0,)),
    'activation_func_clamp_value': ('--activation-func-clamp-value', (None,)),
    'use_mup': ('--use-mup', (False,)),
    'moe_latent_size': ('--moe-latent-size', (None,)),
    'moe_apply_probs_on_input': ('--moe-apply-probs-on-input', (False,)),
    'moe_expert_capacity_factor': ('--moe-expert-capacity-factor', (None,)),
    'moe_expert_rank_capacity_factor': ('--moe-expert-rank-capacity-factor', (None,)),
    'moe_router_force_load_balancing': ('--moe-router-force-load-balancing', (False,)),
    'moe_router_force_biased': ('--moe-router-force-biased', (None,)),
    'moe_mlp_glu_interleave_size': ('--moe-mlp-glu-interleave-size', (None,)),
    'moe_shared_expert_glu_interleave_size': ('--moe-shared-expert-glu-interleave-size', (None,)),
    'moe_router_score_function': ('--moe-router-score-function', ('softmax', 'sigmoid')),
    'moe_router_dtype': ('--moe-router-dtype', (None, 'fp32', 'fp64')),
    'position_embedding_type': ('--position-embedding-type', POSITIONS),
    'normalization': ('--normalization', ('RMSNorm', 'LayerNorm')),
    'residual_type': ('--residual-type', ('standard', 'hc', 'mhc', 'gated', 'attention')),
    'mhc_manifold': ('--mhc-manifold', (None, *MANIFOLDS)),
}


def config_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Our configuration of the model that ``args`` describes.

    Raises:
        ValueError: a flag that has no form here; the message names it.
    """
    if getattr(args, 'enable_hyper_connections', False):
        raise ValueError(
            "--to hf: the run had Megatron's own --enable-hyper-connections; first convert it "
            '--to mhc, and what comes of that --to hf'
        )
    for name, (flag, allowed) in ONLY.items():
        # One that a release does not have was never given.
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise _refused(flag if value is True else f'{flag} {value}', _way_out(name, args))
    config: dict[str, Any] = {ours: getattr(args, theirs, None) for ours, theirs in SAME.items()}
    config['norm_eps'] = norm_eps_of(args)
    if not getattr(args, 'group_query_attention', False):
        config['num_key_value_heads'] = args.num_attention_heads
    config |= {
        'tie_word_embeddings': not args.untie_embeddings_and_output_weights,
        'qkv_bias': bool(args.add_bias_linear or args.add_qkv_bias),
        'hidden_act': _activation(args),
        'rope_parameters': _rope(args),
        'dtype': str(getattr(args, 'params_dtype', torch.float32)).removeprefix('torch.'),
    }
    config |= _experts(args) | _latent(args)
    residual = saved_residual_config(args)
    config |= {ours: getattr(residual, field) for ours, field in RESIDUAL.items()}
    config['fixed_mappings'] = list(residual.fixed_mappings)
    return config


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    if not getattr(args, 'num_experts', None):
        return {'num_experts': 0, 'expert_layers': []}
    balancing = args.moe_router_load_balancing_type
    others = {'sinkhorn', 'quantile_balancing'}
    if others & {*([balancing] if isinstance(balancing, str) else balancing)}:
        raise _refused(f'--moe-router-load-balancing-type {balancing}')
    if args.add_bias_linear:
        raise _refused('--num-experts without --disable-bias-linear')
    every = args.moe_layer_freq
    if isinstance(every, int):
        every = [int(layer % every == 0) for layer in range(args.num_layers)]
    own = {ours: getattr(args, theirs, None) for ours, theirs in EXPERTS.items()}
    own['expert_intermediate_size'] = own['expert_intermediate_size'] or args.ffn_hidden_size
    return own | {'expert_layers': list(every)}


def _latent(args: argparse.Namespace) -> dict[str, Any]:
    """Of multi-latent attention: ``head_dim`` is what RoPE turns, and the rest has its own."""
    if not args.multi_latent_attention:
        return {'kv_lora_rank': None, 'q_lora_rank': None}
    if args.position_embedding_type != 'rope':
        positions = f'--position-embedding-type {args.position_embedding_type}'
        raise _refused(f'--multi-latent-attention with {positions}')
    if args.rotary_percent != 1:
        raise _refused(f'--multi-latent-attention with --rotary-percent {args.rotary_percent}')
    own = {ours: getattr(args, theirs) for ours, theirs in LATENT.items()}
    rope = _rope(args)
    if args.rope_type == 'rope' and args.rotary_scaling_factor > 1 and args.mscale_all_dim:
        raise _refused('--rope-type rope with --mscale-all-dim')
    if args.rope_type != 'rope' and args.rotary_scaling_factor > 1:
        rope |= {ours: getattr(args, theirs) for ours, theirs in YARN.items()} | YARN_CONSTANTS
        rope['attention_factor'] = _mscale(rope, 'mscale') / _mscale(rope, 'mscale_all_dim')
    return own | {'rope_parameters': rope, 'qkv_bias': False}


def _mscale(rope: dict[str, Any], which: str) -> float:
    return 0.1 * float(rope[which]) * math.log(rope['factor']) + 1.0


KEPT = 'keep the checkpoint for Megatron'


def _refused(shown: str, remedy: str = KEPT) -> ValueError:
    return ValueError(
        f'--to hf: the run had {shown}, for which the model written for transformers has no form; '
        f'{remedy}'
    )


def _way_out(name: str, args: argparse.Namespace) -> str:
    """What to do about the argument ``name``: a hybrid model may be a GPT one."""
    pattern = pattern_of(args)
    if pattern is None or name not in ('hybrid_layer_pattern', 'hybrid_override_pattern'):
        return KEPT
    if getattr(args, 'engram_layers', None):
        return f'nor has --engram-layers; {KEPT}'
    try:
        require_gpt_layers(pattern)
    except ValueError:
        return f'{KEPT}: with layers that no GPT model has it stays hybrid'
    return 'first convert it --to gpt, and what comes of that --to hf'


def _activation(args: argparse.Namespace) -> str:
    if args.swiglu:
        return 'silu'
    if args.squared_relu:
        return 'relu2'
    # What the fusion of bias and GeLU computes.
    return 'gelu_pytorch_tanh' if args.bias_gelu_fusion and args.add_bias_linear else 'gelu'


def _rope(args: argparse.Namespace) -> dict[str, Any]:
    scaling = LLAMA3 if getattr(args, 'use_rope_scaling', False) else {'rope_type': 'default'}
    rope = {**scaling, 'rope_theta': float(args.rotary_base)}
    return rope | (
        {'partial_rotary_factor': args.rotary_percent} if args.rotary_percent < 1 else {}
    )


def fill_args(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Write to ``args`` (Megatron's defaults) what ``config_from_args`` reads from them.

    Raises:
        ValueError: the configuration is one that Megatron's arguments cannot say.
    """
    rope, act = dict(config['rope_parameters']), config['hidden_act']
    if config['kv_lora_rank']:
        rope = _fill_latent(args, config, rope)
    scaled = {name: rope.pop(name) for name in LLAMA3 if name in rope}
    if config['attention_bias'] != config['mlp_bias']:
        raise _untold('a bias in only one of attention and MLP')
    if scaled not in ({'rope_type': 'default'}, LLAMA3):
        raise _untold(f'rope_parameters {scaled}')
    if (config['gated_mlp'], act) not in (
        (True, 'silu'),
        *((False, act) for act in ('relu2', 'gelu', 'gelu_pytorch_tanh')),
    ):
        raise _untold(f'hidden_act {act}{" with a gate" if config["gated_mlp"] else ""}')
    for ours, theirs in SAME.items():
        setattr(args, theirs, config[ours])
    if config['num_experts']:
        for ours, theirs in EXPERTS.items():
            setattr(args, theirs, config[ours])
        args.moe_layer_freq = config['expert_layers']
        if len({*config['expert_layers']}) < 2:
            args.moe_layer_freq = 1
    dtype = getattr(torch, config['dtype'])
    values = {
        'norm_epsilon': config['norm_eps'],
        'group_query_attention': config['num_key_value_heads'] != config['num_attention_heads'],
        'untie_embeddings_and_output_weights': not config['tie_word_embeddings'],
        'add_qkv_bias': config['qkv_bias'],
        'squared_relu': act == 'relu2',
        'bias_gelu_fusion': act == 'gelu_pytorch_tanh',
        'use_rope_scaling': scaled == LLAMA3,
        'rotary_base': int(rope['rope_theta']),
        'rotary_percent': rope.get('partial_rotary_factor', 1.0),
        'params_dtype': dtype,
        'bf16': dtype == torch.bfloat16,
        'fp16': dtype == torch.float16,
        'seq_length': config['max_position_embeddings'],
    }
    for name, value in values.items():
        setattr(args, name, value)
    kind = args.residual_type = config['residual_type']
    if kind != 'standard':
        # What an older export has not is as it was before there was a choice.
        said = {field: config[ours] for ours, field in RESIDUAL.items() if ours in config}
        own = ResidualConfig(**{field: _plain(value) for field, value in said.items()})
        write_back(args, own, lambda flag: kind in flag.only.get('residual_type', (kind,)))


def _fill_latent(
    args: argparse.Namespace, config: dict[str, Any], rope: dict[str, Any]
) -> dict[str, Any]:
    """What is left of ``rope_parameters`` without its scaling."""
    args.multi_latent_attention, args.rope_type = True, 'rope'
    for ours, theirs in LATENT.items():
        setattr(args, theirs, config[ours])
    if rope['rope_type'] != 'yarn':
        return rope
    args.rope_type = 'yarn'
    for ours, theirs in YARN.items():
        setattr(args, theirs, rope[ours])
    return {'rope_type': 'default', 'rope_theta': rope['rope_theta']}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _untold(what: str) -> ValueError:
    return ValueError(f"SRC has {what}, which no arguments of Megatron's say; it stays as it is")
