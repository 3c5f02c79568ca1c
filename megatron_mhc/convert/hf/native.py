"""Models that transformers has itself: Llama, Qwen2 and Qwen3, written and read."""

from __future__ import annotations

from typing import Any

SAME = (
    'vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads '
    'num_key_value_heads head_dim max_position_embeddings hidden_act attention_dropout '
    'tie_word_embeddings dtype rope_parameters'
).split()
# What all of them are.
COMMON = {
    'position_embedding_type': 'rope',
    'rope_interleaved': False,
    'normalization': 'RMSNorm',
    'hidden_act': 'silu',
    'gated_mlp': True,
    'residual_in_fp32': False,
    'residual_type': 'standard',
    'num_experts': 0,
    'kv_lora_rank': None,
}
# ``model_type`` -> biases of queries, keys and values, of the output, of the MLP; norm of queries.
BIASES = ('qkv_bias', 'attention_bias', 'mlp_bias', 'qk_norm')
KINDS = {
    'llama': ('LlamaForCausalLM', (False, False, False, False)),
    'qwen2': ('Qwen2ForCausalLM', (True, False, False, False)),
    'qwen3': ('Qwen3ForCausalLM', (False, False, False, True)),
}
# One that transformers gives no value to.
ABSENT = {
    'attention_dropout': 0.0,
    'dtype': 'float32',
    'tie_word_embeddings': False,
    'expert_layers': [],
}


def as_native(config: dict[str, Any]) -> dict[str, Any] | None:
    """What is written for a model that transformers has itself; None for any other."""
    whole = config['hidden_size'] == config['num_attention_heads'] * config['head_dim']
    if any(config[name] != value for name, value in COMMON.items()) or not whole:
        return None
    if 'partial_rotary_factor' in config['rope_parameters']:
        return None
    for model_type, (name, biases) in KINDS.items():
        if tuple(config[key] for key in BIASES) == biases:
            return {
                'architectures': [name],
                'model_type': model_type,
                'rms_norm_eps': config['norm_eps'],
                **{key: config[key] for key in SAME},
            }
    return None


def from_native(native: dict[str, Any]) -> dict[str, Any] | None:
    """Our configuration of one of these models; None where it is none of them.

    Raises:
        ValueError: it is one with a setting that none of Megatron's flags has.
    """
    model_type = native.get('model_type')
    if model_type not in KINDS:
        return None
    for name in ('attention_bias', 'mlp_bias', 'use_sliding_window'):
        if native.get(name):
            raise ValueError(f'SRC: config.json has {name}, which no form of Megatron has here')
    config = {
        **ABSENT,
        **COMMON,
        **{key: native[key] for key in SAME if native.get(key) is not None},
    }
    config['norm_eps'] = native['rms_norm_eps']
    config.setdefault('num_key_value_heads', config['num_attention_heads'])
    config.setdefault('head_dim', config['hidden_size'] // config['num_attention_heads'])
    if 'torch_dtype' in native:
        config['dtype'] = native['torch_dtype']
    if 'rope_parameters' not in config:
        # As transformers wrote it before its fifth release.
        scaling = native.get('rope_scaling') or {'rope_type': 'default'}
        config['rope_parameters'] = {**scaling, 'rope_theta': native.get('rope_theta', 10000.0)}
    return config | dict(zip(BIASES, KINDS[model_type][1], strict=True))
