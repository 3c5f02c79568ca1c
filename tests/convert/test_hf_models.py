"""What transformers computes with an exported model is what Megatron computes."""

from __future__ import annotations

import json

import hf_models
import pytest
import torch
from hf_models import GROUPED, LLAMA, UNTIED
from safetensors.torch import load_file

from megatron_mhc.convert import verify
from megatron_mhc.convert.hf.export import export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.convert.hf.verify import exported_logits
from megatron_mhc.convert.saved_args import own_residual
from megatron_mhc.convert.source import open_source
from megatron_mhc.settings.flags_residual import same_structure

MHC, HC = '--residual-type mhc', '--residual-type hc'
GATED = f'--residual-type gated --gated-residual-rank 5 {LLAMA}'
# Of six sublayers, so that blocks end within layers, too.
ATTENTION = '--residual-type attention --attention-residual-block-size 3'
EXPERTS = '--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16'
LATENT = (
    '--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 '
    '--v-head-dim 12'
)
GPT = '--position-embedding-type learned_absolute'
# Flags -> ``model_type`` of the export.
MODELS = {
    'llama': (f'{LLAMA} {UNTIED} {GROUPED}', 'llama'),
    'llama 3, tied': (f'{LLAMA} --use-rope-scaling --rotary-base 500000', 'llama'),
    'qwen2': (f'{LLAMA} {UNTIED} --add-qkv-bias', 'qwen2'),
    'qwen3': (f'{LLAMA} {UNTIED} {GROUPED} --qk-layernorm', 'qwen3'),
    'gpt': (GPT, 'megatron_mhc'),
    'relu2': (f'{GPT} --squared-relu --no-bias-gelu-fusion', 'megatron_mhc'),
    'mhc': (f'{MHC} {LLAMA} {GROUPED}', 'megatron_mhc'),
    'mhc gpt': (f'{MHC} {GPT} {UNTIED} --mhc-num-residual-streams 3', 'megatron_mhc'),
    'mhc learned': (
        f'{MHC} {LLAMA} {UNTIED} --qk-layernorm --mhc-stream-merge learned --mhc-norm-eps 1e-3',
        'megatron_mhc',
    ),
    'mhc gelu': (
        f'{MHC} --position-embedding-type rope --rotary-percent 0.5 --no-bias-gelu-fusion '
        '--qk-layernorm --mhc-stream-merge sum --mhc-fixed-mappings post res',
        'megatron_mhc',
    ),
    'mhc interleaved': (
        f'{MHC} {LLAMA} --rotary-interleaved --add-qkv-bias --mhc-sinkhorn-iterations 3',
        'megatron_mhc',
    ),
    'experts': (
        f'{LLAMA} {UNTIED} {EXPERTS} --moe-router-topk-scaling-factor 1.5',
        'megatron_mhc',
    ),
    'mhc experts': (
        f'{MHC} {LLAMA} {EXPERTS} --moe-router-pre-softmax --moe-layer-freq [0]+[1]*2 '
        '--moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate',
        'megatron_mhc',
    ),
    'hc experts by sigmoid': (
        f'{HC} {LLAMA} {EXPERTS} --moe-router-score-function sigmoid --moe-router-num-groups 4 '
        '--moe-router-enable-expert-bias --moe-router-group-topk 2 --moe-router-dtype fp32 '
        '--moe-shared-expert-intermediate-size 32',
        'megatron_mhc',
    ),
    'latent': (
        f'{LLAMA} {UNTIED} {LATENT} --rotary-scaling-factor 40 --mscale 0.7 --mscale-all-dim 0.5',
        'megatron_mhc',
    ),
    'mhc latent experts': (
        f'{MHC} {LLAMA} {LATENT} {EXPERTS} --q-lora-rank 16 --qk-layernorm --rope-type rope',
        'megatron_mhc',
    ),
    'hc latent without norms': (f'{HC} {LLAMA} {LATENT} --q-lora-rank 16', 'megatron_mhc'),
    'single pass': (f'{MHC} {LLAMA} --mhc-single-pass', 'megatron_mhc'),
    'permutation': (f'{MHC} {LLAMA} --mhc-manifold permutation', 'megatron_mhc'),
    'kronecker': (
        f'{MHC} {LLAMA} --mhc-manifold kronecker --mhc-num-residual-streams 6',
        'megatron_mhc',
    ),
    'orthogonal': (f'{MHC} {LLAMA} --mhc-manifold orthogonal', 'megatron_mhc'),
    'diagonal': (f'{MHC} {LLAMA} --mhc-manifold diagonal', 'megatron_mhc'),
    'identity': (f'{MHC} {LLAMA} --mhc-manifold identity', 'megatron_mhc'),
    'as megatron dev': (
        f'{MHC} {LLAMA} --mhc-numerics megatron-dev --norm-epsilon 1e-2',
        'megatron_mhc',
    ),
    'as megatron main': (f'{MHC} {LLAMA} --mhc-numerics megatron-main', 'megatron_mhc'),
    'all fixed': (f'{MHC} {LLAMA} --mhc-fixed-mappings pre post res', 'megatron_mhc'),
    'gated': (f'{GATED} {GROUPED}', 'megatron_mhc'),
    'gated latent experts': (
        f'{GATED} {UNTIED} {LATENT} {EXPERTS} --q-lora-rank 16 --qk-layernorm --rope-type rope '
        '--moe-layer-freq [0]+[1]*2 --mhc-num-residual-streams 3',
        'megatron_mhc',
    ),
    'attention': (f'{ATTENTION} {LLAMA} {GROUPED}', 'megatron_mhc'),
    'attention experts': (
        f'{ATTENTION} {LLAMA} {UNTIED} {EXPERTS}',
        'megatron_mhc',
    ),
    'attention gpt': (f'{ATTENTION} {GPT}', 'megatron_mhc'),
    'hc': (f'{HC} {LLAMA} {GROUPED} {UNTIED}', 'megatron_mhc'),
    'hc gpt': (f'{HC} {GPT} --hc-no-tanh --mhc-stream-merge mean', 'megatron_mhc'),
    'hc static': (f'{HC} {LLAMA} --hc-variant static --mhc-stream-merge learned', 'megatron_mhc'),
}


@pytest.fixture
def exported(megatron, parse, random_seed, tmp_path):
    """``exported(flags)`` -> the checkpoint and the folder for transformers."""

    def run(flags: str, **values):
        args = hf_models.arguments(parse, flags, **values)
        source = hf_models.checkpoint(args, tmp_path / 'run')
        export(source, tmp_path / 'hf')
        return source, tmp_path / 'hf'

    return run


@pytest.mark.parametrize('case', MODELS)
def test_logits_are_those_of_megatron(exported, case):
    flags, model_type = MODELS[case]
    source, folder = exported(flags)
    assert json.loads((folder / 'config.json').read_text())['model_type'] == model_type
    expected = hf_models.megatron_logits(source)
    tokens = verify.random_tokens(open_source(source).args)
    for attention in ('sdpa', 'eager'):
        got = exported_logits(folder, tokens, attn_implementation=attention)
        print(case, attention, (got - expected).abs().max().item(), expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', ['gated latent experts', 'attention'])
def test_what_has_another_residual_comes_back_bitwise(exported, tmp_path, case):
    """Under the names of Transformer Engine's layers; with its settings, and the same logits."""
    source, folder = exported(MODELS[case][0])
    restore(folder, tmp_path / 'back')
    export(tmp_path / 'back', tmp_path / 'again')
    first, second = (load_file(p / 'model.safetensors') for p in (folder, tmp_path / 'again'))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    own, back = (own_residual(open_source(path).args) for path in (source, tmp_path / 'back'))
    assert same_structure(own, back) and own.residual_type in case
    logits = [hf_models.megatron_logits(path) for path in (source, tmp_path / 'back')]
    assert torch.equal(*logits)
