"""Parameters and FLOPs on paper against the model that Megatron builds and its own count."""

from __future__ import annotations

import inspect

import pytest

from megatron_mhc.recipes.build import build, counted, model_arguments, recipe_arguments
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.settings.flags_residual import residual_config_from_args
from megatron_mhc.sizing.flops import STEP, residual_flops, step_flops, token_flops
from megatron_mhc.sizing.shape import shape_from_args
from megatron_mhc.sizing.size import summary

SIZES = {
    'num-layers': 3,
    'hidden-size': 32,
    'num-attention-heads': 4,
    'seq-length': 16,
    'max-position-embeddings': 24,
}
ROPE = {'position-embedding-type': 'rope'}
LATENT = {
    **ROPE,
    'multi-latent-attention': True,
    'rope-type': 'rope',
    'no-rope-fusion': True,
    'kv-lora-rank': 12,
    'qk-head-dim': 8,
    'qk-pos-emb-head-dim': 4,
    'v-head-dim': 6,
}
MOE = {'num-experts': 8, 'moe-router-topk': 3, 'moe-ffn-hidden-size': 20}
SHARED = {'moe-shared-expert-intermediate-size': 28, 'moe-layer-freq': '([0,1,1])'}
PLAIN = {'disable-bias-linear': True, 'swiglu': True, 'normalization': 'RMSNorm'}
MODELS = {
    'GPT-2': {},
    'GQA': {**ROPE, **PLAIN, 'group-query-attention': True, 'num-query-groups': 2},
    'QKV bias and norm': {**ROPE, **PLAIN, 'add-qkv-bias': True, 'qk-layernorm': True},
    'wide heads, untied': {'kv-channels': 16, 'untie-embeddings-and-output-weights': True},
    'MLA': {**LATENT, **PLAIN},
    'MLA with biases': LATENT,
    'MLA, query latent and norms': {**LATENT, 'q-lora-rank': 10, 'qk-layernorm': True},
    'MoE': {**ROPE, **PLAIN, **MOE},
    'MoE with biases': {**ROPE, **MOE, 'moe-layer-freq': 2},
    'MLA, MoE, shared experts': {**LATENT, **PLAIN, **MOE, **SHARED},
}
RESIDUALS = {
    'mhc': {'residual-type': 'mhc', 'mhc-num-residual-streams': 3},
    'mhc learned': {'residual-type': 'mhc', 'mhc-stream-merge': 'learned'},
    'mhc permutation': {'residual-type': 'mhc', 'mhc-manifold': 'permutation'},
    'mhc identity': {'residual-type': 'mhc', 'mhc-manifold': 'identity'},
    'mhc fixed': {'residual-type': 'mhc', 'mhc-fixed-mappings': ('pre', 'post', 'res')},
    'hc': {'residual-type': 'hc'},
    'hc static': {'residual-type': 'hc', 'hc-variant': 'static'},
    'gated': {'residual-type': 'gated', 'gated-residual-rank': 5},
    'attention': {'residual-type': 'attention'},
}


@pytest.fixture(scope='module')
def parser(megatron):
    """Megatron's parser knows our flags, and its own count of FLOPs is not wrapped yet."""
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import TRAINING_PATCHES

    engine.apply((ARGUMENTS_PATCH,))
    yield
    engine.revert((ARGUMENTS_PATCH, *TRAINING_PATCHES))


def counting():
    """What the training loop calls for its TFLOP/s line, and stock Megatron's."""
    from megatron.training import training

    function = training.num_floating_point_operations
    return function, inspect.unwrap(function)


@pytest.mark.parametrize('name', MODELS)
def test_every_kind_of_model_is_counted_exactly(parser, name):
    args = model_arguments(SIZES | MODELS[name], 64)
    assert summary(shape_from_args(args)) == counted(build(args), args)


@pytest.mark.parametrize('name', RESIDUALS)
def test_every_kind_of_residual_is_counted_exactly(parser, name):
    args = model_arguments(SIZES | MODELS['MoE'] | RESIDUALS[name], 64)
    found = counted(build(args), args)
    assert summary(shape_from_args(args)) == found
    assert (found['mhc'] > 0) == (name != 'mhc fixed')


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_and_its_flags_are_the_same_model(parser, name):
    args = recipe_arguments(RECIPES[name])
    # Of the flags that shape no model, but its bytes.
    args.bf16 = True
    assert shape_from_args(args) == RECIPES[name].shape()


@pytest.mark.parametrize(
    ('name', 'total', 'active', 'mhc'),
    [
        ('3b', '2.973', '0.612', '2.95'),
        ('9b', '9.178', '1.661', '6.64'),
        ('27b', '27.048', '4.139', '14.75'),
    ],
)
def test_the_built_models_have_the_papers_sizes(parser, name, total, active, mhc):
    """mHC, Table 5; meta device, hence no memory. Equal to the formulas to the last parameter."""
    args = recipe_arguments(RECIPES[name])
    model = build(args)
    assert all(parameter.is_meta for parameter in model.parameters())
    # MLA's default is YaRN, with the same parameters and another function.
    assert model.config.rope_type == 'rope' and model.config.layernorm_epsilon == 1e-20
    found = counted(model, args)
    assert (f'{found["total"] / 1e9:.3f}', f'{found["active"] / 1e9:.3f}') == (total, active)
    assert f'{found["mhc"] / 1e6:.2f}' == mhc
    assert found == summary(RECIPES[name].shape())


@pytest.mark.parametrize('name', MODELS)
def test_flops_are_megatrons_own(parser, name):
    """It leaves out the router, and counts a multiplication for each value of a latent's norm."""
    args = model_arguments(SIZES | MODELS[name], 64)
    shape, sequences = shape_from_args(args), 5
    norms = 0
    if args.multi_latent_attention:
        norms = 2 * args.num_layers * (args.kv_lora_rank + (args.q_lora_rank or 0))
    difference = norms - token_flops(shape).get('router', 0)
    stock = counting()[1](args, sequences)
    assert stock == step_flops(shape, sequences) + STEP * sequences * args.seq_length * difference


@pytest.mark.parametrize('name', RESIDUALS)
def test_the_throughput_line_counts_the_residual_topology(parser, name):
    args = model_arguments(SIZES | MODELS['MoE'] | RESIDUALS[name], 64)
    own = residual_flops(residual_config_from_args(args), args.hidden_size, 2 * args.num_layers)
    assert own > 0
    ours, stock = counting()
    assert ours(args, 5) == stock(args, 5) + 3 * 5 * args.seq_length * own
    if 'total_real_tokens_in_batch' in inspect.signature(stock).parameters:
        packed = (1000, 70)  # sum of squared lengths, and tokens, without padding
        assert ours(args, 5, *packed) == stock(args, 5, *packed) + 3 * 70 * own


@pytest.mark.parametrize('name', ['mhc', 'mudd'])
def test_each_layer_of_a_hybrid_model_is_one_sublayer_of_the_count(parser, name):
    """Of the main layers: prediction layers, and MLPs under dense connections, add nothing."""
    sizes = {name: value for name, value in SIZES.items() if name != 'num-layers'}
    if name == 'mhc':
        model = {'hybrid-layer-pattern': '*-*E/*-', **ROPE, **MOE, **RESIDUALS['mhc']}
    else:
        mudd = {'residual-type': 'mudd', 'transformer-impl': 'local'}
        model = {'hybrid-layer-pattern': '*-*E', **MOE, **mudd}
    args = model_arguments(sizes | model, 64)
    # Dense connections between two blocks of two layers cost what they do between two GPT layers.
    own = residual_flops(residual_config_from_args(args), args.hidden_size, 4)
    assert own > 0
    ours, stock = counting()
    assert ours(args, 5) == stock(args, 5) + 3 * 5 * args.seq_length * own


def test_a_standard_run_keeps_megatrons_count(parser):
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.registry import TRAINING_PATCHES

    engine.revert(TRAINING_PATCHES)
    args = model_arguments(SIZES, 64)
    ours, stock = counting()
    assert ours is stock
    engine.apply(TRAINING_PATCHES)
    assert counting()[0](args, 5) == stock(args, 5)
