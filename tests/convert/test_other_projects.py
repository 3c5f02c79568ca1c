"""Weights of GLM-5.3, DeepSeek-V4.1, Hy4 and megatron-bridge become ours, and go back."""

from __future__ import annotations

import argparse
import json

import hf_models
import pytest
import torch
import yaml
from hf_models import LLAMA, UNTIED

from megatron_mhc.convert.conversion import convert
from megatron_mhc.convert.source import RUN_CONFIG, open_source

# Layout -> flags under which ours compute the same.
FLAGS = {
    'glm-5.3': '--mhc-numerics glm-5.3',
    'deepseek-v4.1': '--mhc-single-pass --mhc-numerics deepseek-v4 --mhc-norm-eps 1e-20',
    'hy4': '--mhc-manifold identity --mhc-numerics hy4',
}
# Names of released weights: GLM-5.3-Flash and Hy4 as transformers 5.24 writes them
# (``conversion_mapping.py``), V4.1 by ``deepseek_v41/state_dict_adapter.py`` of nemo-automodel 0.7.
NAMES = {
    'glm-5.3': 'model.language_model.layers.1.hc_attn_fn',
    'deepseek-v4.1': 'layers.1.hc_ffn_scale',
    'hy4': 'model.layers.1.hc_pre.hc_mlp_layer.hc_base',
}
TINY = {
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'vocab_size': 32,
    'intermediate_size': 16,
    'moe_intermediate_size': 8,
    'n_routed_experts': 2,
    'num_experts_per_tok': 1,
    'q_lora_rank': 8,
    'kv_lora_rank': 8,
    'qk_nope_head_dim': 4,
    'v_head_dim': 4,
    'index_n_heads': 2,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
}


@pytest.fixture
def made(megatron, parse, random_seed, tmp_path):
    """``made(flags)`` -> a checkpoint with random weights."""

    def run(flags: str):
        args = hf_models.arguments(parse, f'{LLAMA} {UNTIED} {flags}')
        return hf_models.checkpoint(args, tmp_path / 'run')

    return run


def tensors(path):
    source = open_source(path)
    return {n: source.tensor(n) for n, entry in source.entries.items() if entry.shape is not None}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize('to', FLAGS)
def test_there_and_back_is_bitwise_and_computes_the_same(made, tmp_path, to):
    source = made(f'--residual-type mhc {FLAGS[to]}')
    there = convert(source, tmp_path / 'there', to, unchecked=True)
    stored = tensors(tmp_path / 'there')
    assert NAMES[to] in stored
    back = convert(tmp_path / 'there', tmp_path / 'back', unchecked=True)
    for report in (there, back):
        assert max(report.differences.values()) < 1e-6, report.differences
    assert (back.origin, there.origin) == (to, 'mhc')
    again = convert(tmp_path / 'back', tmp_path / 'again', to, unchecked=True)
    assert again.left_out == 0
    assert_same(tensors(tmp_path / 'again'), stored)
    args = [open_source(path).args for path in (source, tmp_path / 'back')]
    differ = {k for k in vars(args[0]) if vars(args[0])[k] != vars(args[1]).get(k)}
    assert not differ
    expected = hf_models.megatron_logits(source)
    assert torch.equal(hf_models.megatron_logits(tmp_path / 'back'), expected)


@pytest.mark.parametrize('to', ['deepseek-v4.1', 'hy4'])
def test_a_standard_model_becomes_one(made, tmp_path, to):
    """Exact but for the eps of their gates."""
    source = made('')
    convert(source, tmp_path / 'there', to, unchecked=True)
    convert(tmp_path / 'there', tmp_path / 'mhc', unchecked=True)
    got, expected = map(hf_models.megatron_logits, (tmp_path / 'mhc', source))
    assert 0 < (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ('flags', 'to', 'message'),
    [
        (
            '--mhc-single-pass',
            'deepseek-v4',
            'trained with --mhc-single-pass, which .* choose .*4.1',
        ),
        ('--mhc-manifold identity', 'glm-5.3', '--mhc-manifold identity, which .*; choose hy4'),
        ('', 'hy4', 'have --mhc-manifold identity, without which .* choose megatron-main or'),
        ('', 'deepseek-v4.1', 'its models have --mhc-single-pass, without which'),
        ('--mhc-manifold identity --mhc-single-pass', 'hy4', 'which that .* it stays as it is'),
        ('', 'megatron-bridge', 'is a file of the torch format, and'),
        ('--mhc-stream-merge learned', 'glm-5.3', 'no place for the learned merge'),
    ],
)
def test_what_no_layout_makes_up_for(made, tmp_path, flags, to, message):
    source = made(f'--residual-type mhc {flags}')
    with pytest.raises(ValueError, match=message) as refused:
        convert(source, tmp_path / 'new', to, unchecked=True)
    assert '\n' not in str(refused.value) and not (tmp_path / 'new').exists()


def glm():
    from transformers.models.glm5_next import modeling_glm5_next as theirs
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextConfig

    vision = {'depth': 1, 'num_heads': 2, 'out_hidden_size': 16, 'projection_intermediate_size': 16}
    text = TINY | {'index_head_dim': 8, 'linear_head_dim': 4, 'linear_num_heads': 2}
    config = Glm5NextConfig(
        text_config=text, vision_config=vision | {'hidden_size': 16, 'intermediate_size': 16}
    )
    return theirs.Glm5NextForConditionalGeneration(config)


def hy4():
    from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
    from transformers.models.hy_v4.modeling_hy_v4 import HYV4ForCausalLM

    sizes = TINY | {'index_head_dim': 8, 'qk_rope_head_dim': 4}
    return HYV4ForCausalLM(HYV4Config(**sizes))


@pytest.mark.parametrize(('name', 'build'), [('glm-5.3', glm), ('hy4', hy4)])
def test_what_transformers_saved_goes_back_and_loads(tmp_path, random_seed, name, build):
    """Of a model that Megatron never saw: all of it, with its configuration."""
    theirs = build().eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if '_hc' in key:
                value.normal_()
    theirs.save_pretrained(tmp_path / 'saved')
    report = convert(tmp_path / 'saved', tmp_path / 'mhc')
    assert report.origin == name and max(report.differences.values()) < 1e-6
    args = open_source(tmp_path / 'mhc').args
    assert (args.mhc_numerics, args.mhc_norm_eps) == (name, 1e-5)
    convert(tmp_path / 'mhc', tmp_path / 'back', name)
    assert_same(tensors(tmp_path / 'saved'), tensors(tmp_path / 'back'))
    loaded, info = type(theirs).from_pretrained(tmp_path / 'back', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    for key, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    wrong = {'hc_eps': 1e-5, 'rms_norm_eps': 'x', 'hc_magnitude': 1.5, 'model_type': 'glm6'}
    if name == 'glm-5.3':
        del wrong['hc_magnitude']
    for key, value in wrong.items():
        config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
        inner = config['text_config'] if name == 'glm-5.3' else config
        (config if key == 'model_type' else inner)[key] = value
        folder = tmp_path / key
        folder.mkdir()
        (folder / 'model.safetensors').symlink_to(tmp_path / 'saved' / 'model.safetensors')
        (folder / 'config.json').write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f'{key}.* config.json'):
            convert(folder, tmp_path / 'new')


def test_a_bridge_run_has_its_arguments_elsewhere(made, tmp_path):
    """In ``run_config.yaml`` of an iteration, where its plain state has none.

    Modules are those of Megatron's dev branch (``deepseek_v4_bridge.py`` of megatron-bridge 0.6),
    files as its ``training/checkpointing.py`` reads and writes them.
    """
    source = made('--residual-type mhc --mhc-numerics megatron-dev')
    release = tmp_path / 'dist' / 'release'
    convert(source, tmp_path / 'v4', 'deepseek-v4', unchecked=True)
    convert(tmp_path / 'v4', tmp_path / 'dist', 'megatron-bridge', unchecked=True)
    written = yaml.safe_load((release / RUN_CONFIG).read_text())
    assert written['model']['enable_hyper_connections'] is True
    assert written['checkpoint']['save_optim'] is False
    # As megatron-bridge saves it, with what its configuration makes of a model.
    provider = {'_target_': 'megatron.bridge.models.mla_provider.MLAModelProvider'}
    kept = ('num_layers', 'hidden_size', 'enable_hyper_connections', 'num_residual_streams')
    kept += ('mhc_sinkhorn_iterations', 'layernorm_epsilon')
    model = provider | {name: written['model'][name] for name in kept}
    model['params_dtype'] = {'_target_': 'torch.float32', '_call_': False}
    (release / RUN_CONFIG).write_text(yaml.safe_dump(written | {'model': model}))
    common = torch.load(release / 'common.pt', weights_only=False)
    assert isinstance(common.pop('args'), argparse.Namespace)
    torch.save(common, release / 'common.pt')
    report = convert(tmp_path / 'dist', tmp_path / 'mhc')
    assert report.origin == 'megatron-bridge'
    convert(tmp_path / 'mhc', tmp_path / 'back', 'megatron-bridge')
    assert_same(tensors(tmp_path / 'dist'), tensors(tmp_path / 'back'))
    again = yaml.safe_load((tmp_path / 'back' / 'release' / RUN_CONFIG).read_text())['model']
    assert {name: again[name] for name in kept} == {name: model[name] for name in kept}
    assert again['_target_'] == model['_target_']
    (release / RUN_CONFIG).write_text('model: [')
    with pytest.raises(ValueError, match='run_config.yaml cannot be read'):
        convert(tmp_path / 'dist', tmp_path / 'new')
