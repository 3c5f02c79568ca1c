"""Hybrid models: every layer of a pattern is a sublayer with its own hyper-connection."""

from __future__ import annotations

import pytest
import torch
from layout_cases import MIXERS as SIZES
from layout_cases import MOE
from test_model_patches import groups_of

from megatron_mhc import ResidualConfig
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.pipeline import PipelineConfig

HC, MHC = {'residual_type': 'hc'}, {'residual_type': 'mhc', 'init': 'identity'}
RESIDUALS = {
    'standard': None,
    'hc': HC,
    'mhc': MHC,
    'single pass': {**MHC, 'single_pass': True},
    # Summed streams divide the initial output projections.
    'sum': {**HC, 'stream_merge': 'sum', 'hc_variant': 'static'},
    'learned, orthogonal': {**MHC, 'stream_merge': 'learned', 'manifold': 'orthogonal'},
}


MIXERS = {**SIZES, 'activation_func': torch.nn.functional.silu}


@pytest.fixture
def hybrid(megatron):
    from hybrid_models import hybrid_model

    return hybrid_model


def block_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


@torch.no_grad()
def randomise(model):
    """Give every parameter of ours a value that makes it matter."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(model.named_parameters()):
        if 'hyper_connection' in name or 'stream_merge' in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize('residual', RESIDUALS)
@pytest.mark.parametrize('mlp', ['-', 'E'])
def test_attention_and_mlp_in_turn_are_a_gpt_model(build, hybrid, step, residual, mlp):
    from hybrid_models import name_in_hybrid, take_weights

    settings = MOE if mlp == 'E' else {}
    gpt = build(RESIDUALS[residual], spec=block_spec if mlp == 'E' else None, **settings)
    randomise(gpt)
    same = hybrid(f'*{mlp}' * 3, RESIDUALS[residual], **settings)
    take_weights(same, gpt)
    (loss, gradients), (wanted, references) = step(same), step(gpt)
    assert torch.equal(loss, wanted)
    assert gradients.keys() == {name_in_hybrid(name) for name in references}
    for name, reference in references.items():
        assert torch.equal(gradients[name_in_hybrid(name)], reference), name
    own = [gradient for name, gradient in references.items() if 'hyper_connection' in name]
    assert all(gradient.abs().max() > 0 for gradient in own) and bool(own) == (
        residual != 'standard'
    )


# Like each other with no bit changed: what a run may turn on while it trains the same model.
FULL = {
    'recompute_granularity': 'full',
    'recompute_method': 'uniform',
    'recompute_num_layers': 2,
}
WAYS = {
    'full': ({}, FULL),
    'segments': ({'recompute_layer_num': 3}, {}),
    'full-segments': ({'recompute_layer_num': 'auto'}, FULL),
}


@pytest.mark.parametrize('way', WAYS)
def test_recomputation_changes_no_bit(hybrid, step, way):
    residual, settings = WAYS[way]
    plain = hybrid('M*-G-', MHC, **MIXERS)
    other = hybrid('M*-G-', {**MHC, **residual}, **MIXERS, **settings)
    for model in (plain, other):
        randomise(model)
    (loss, gradients), (wanted, references) = step(other), step(plain)
    assert torch.equal(loss, wanted) and gradients.keys() == references.keys()
    for name, reference in references.items():
        assert torch.equal(gradients[name], reference), name


# n = 2 streams with constant maps are the standard residual, bit for bit.
CONSTANT = {
    'num_residual_streams': 2,
    'fixed_mappings': ('pre', 'post', 'res'),
    'stream_merge': 'mean',
}


@pytest.mark.parametrize('residual_type', ['hc', 'mhc'])
def test_mixers_with_constant_maps_are_the_standard_model(hybrid, step, residual_type):
    standard = hybrid('MGM', None, **MIXERS)
    widened = hybrid('MGM', {'residual_type': residual_type, **CONSTANT}, **MIXERS)
    (loss, gradients), (wanted, references) = step(widened), step(standard)
    assert torch.equal(loss, wanted) and gradients.keys() == references.keys()
    assert {'decoder.layers.0.mixer.A_log', 'decoder.layers.1.self_attention.A_log'} < {*gradients}
    for name, reference in references.items():
        torch.testing.assert_close(gradients[name], reference, rtol=2e-6, atol=1e-8, msg=name)


def test_a_mamba_layer_computes_its_equations(hybrid):
    """Eq 3 of mHC, written out: H_res x + H_post^T F(H_pre x)."""
    model = hybrid('MM', MHC, **MIXERS)
    randomise(model)
    layer = model.decoder.layers[1]
    x = torch.randn(16, 2, 4 * 32, generator=torch.Generator().manual_seed(1))
    h_pre, h_post, h_res = layer.mixer_hyper_connection.all_maps(x)
    streams = x.unflatten(-1, (4, 32))
    u = torch.einsum('...n,...nc->...c', h_pre, streams)
    y, bias = layer.mixer(layer.norm(u))
    assert bias is None
    wanted = h_res @ streams + h_post.unsqueeze(-1) * y.unsqueeze(-2)
    torch.testing.assert_close(layer(x), wanted.flatten(-2), rtol=1e-5, atol=1e-6)


# Small, and with another width of values than of keys.
LATENT = {
    'q_lora_rank': None,
    'kv_lora_rank': 16,
    'qk_head_dim': 8,
    'qk_pos_emb_head_dim': 4,
    'v_head_dim': 8,
    'rope_type': 'rope',
    'apply_rope_fusion': False,
}


def test_every_layer_has_a_connection_of_its_own(hybrid, step):
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    from megatron_mhc.residual.hyper_connection import HyperConnection

    # Latent attention has a symbol from 0.19 on.
    latent = hasattr(mamba_stack_spec.submodules, 'mla_layer')
    pattern, settings = ('ME+-', {**MOE, **LATENT}) if latent else ('ME*-', MOE)
    model = hybrid(pattern, MHC, **MIXERS, **settings)
    found = [m for m in model.modules() if isinstance(m, HyperConnection)]
    # Streams favoured at the start go round over all layers; a row names layer and half.
    assert [connection.sublayer for connection in found] == [0, 1, 2, 3]
    assert [connection.row for connection in found] == [0, 3, 4, 7]
    randomise(model)
    loss, gradients = step(model)
    assert loss.isfinite().all()
    for name, gradient in gradients.items():
        if name.endswith('mapping_proj.weight'):
            assert gradient.abs().max() > 0, name


def test_only_phi_may_be_decayed(hybrid):
    model = hybrid('ME*-', {**MHC, 'mapping_weight_decay': True}, **MIXERS, **MOE)
    own = {name: wd for name, wd in groups_of(model).items() if 'hyper_connection' in name}
    assert {name.split('.')[2] for name in own} == {'0', '1', '2', '3'}
    for name, multiplier in own.items():
        assert multiplier == (1.0 if name.endswith('mapping_proj.weight') else 0.0), name


@pytest.mark.parametrize(
    'setting',
    [
        {'engram_config': EngramConfig(layers=(1,), heads=2, table_size=50, dim=16)},
        {'pipeline_config': PipelineConfig('zb-v')},
        {'mhc_post_stream': 'high'},
        {'residual_config': ResidualConfig('mudd')},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_gpt_models_alone_have_is_refused_before_the_model_is_built(hybrid, setting):
    """The config of a caller without a command line, which may not say that it is of a hybrid."""
    config = {'pipeline_model_parallel_size': 2} if 'pipeline_config' in setting else {}
    config |= {'pipeline_dtype': torch.float32, 'is_hybrid_model': False}
    with pytest.raises(ValueError, match='--hybrid-layer-pattern cannot be combined with'):
        hybrid('*-', on_config=setting, **config)
