"""Hybrid models: every layer of a pattern is a sublayer with its own hyper-connection."""

from __future__ import annotations

import pytest
import torch
from layout_cases import LATENT, MOE
from layout_cases import MIXERS as SIZES
from test_model_patches import groups_of

from megatron_mhc import compat
from megatron_mhc.mudd.sizes import mudd_parameters
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


def mtp_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    return get_gpt_mtp_block_spec(config, block_spec(config), use_transformer_engine=False)


@torch.no_grad()
def randomise(model):
    """Give every parameter of ours a value that makes it matter."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(model.named_parameters()):
        if any(
            own in name
            for own in ('hyper_connection', 'stream_merge', '.engram.', 'dense_aggregates')
        ):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


ROTARY = {'apply_rope_fusion': False}
# Pattern -> the GPT model that it is, and the settings of both.
TWINS = {
    '*-*-*-': ({}, {}),
    '*E*E*E': ({'spec': block_spec}, MOE),
    '*-*-*-/*-/*-': ({'mtp_spec': mtp_spec}, ROTARY),
    '*E*E*E/*E': ({'spec': block_spec, 'mtp_spec': mtp_spec}, {**ROTARY, **MOE}),
    '+-+-+-': ({'spec': block_spec}, LATENT),
    '+E+E+E/+E': ({'spec': block_spec, 'mtp_spec': mtp_spec}, {**LATENT, **MOE}),
}


def twins(build, hybrid, residual, pattern):
    """The GPT model and the hybrid one, with the same weights, ours drawn at random."""
    from hybrid_models import has_symbols, take_weights

    if not has_symbols(pattern):
        pytest.skip('this release has no symbol for latent attention')
    given, settings = TWINS[pattern]
    predicted = pattern.count('/')
    rotary = {'position_embedding_type': 'rope'} if predicted else {}
    gpt = build(residual, **given, mtp_num_layers=predicted or None, **settings)
    randomise(gpt)
    same = hybrid(pattern, residual, **rotary, **settings)
    take_weights(same, gpt)
    return gpt, same


def assert_same_step(step, hybrid, gpt):
    """Loss and gradients of both, bit for bit; returns the gradients of ``gpt``."""
    from hybrid_models import name_in_hybrid

    (loss, gradients), (wanted, references) = step(hybrid), step(gpt)
    assert torch.equal(loss, wanted)
    assert gradients.keys() == {name_in_hybrid(name) for name in references}
    for name, reference in references.items():
        assert torch.equal(gradients[name_in_hybrid(name)], reference), name
    return references


@pytest.mark.parametrize(
    ('pattern', 'residual'),
    [(p, r) for p in TWINS for r in RESIDUALS if len(p) == 6 or r in ('standard', 'hc', 'mhc')],
)
def test_attention_and_mlp_in_turn_are_a_gpt_model(
    build, hybrid, step, monkeypatch, residual, pattern
):
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    # Of a process: it has room for as many predictions as the first model made.
    monkeypatch.setattr(MTPLossLoggingHelper, 'tracker', {})
    gpt, same = twins(build, hybrid, RESIDUALS[residual], pattern)
    references = assert_same_step(step, same, gpt)
    own = [gradient for name, gradient in references.items() if 'hyper_connection' in name]
    assert all(gradient.abs().max() > 0 for gradient in own) and bool(own) == (
        residual != 'standard'
    )


MEMORY = {'heads': 2, 'table_size': 50, 'dim': 16}


@pytest.mark.parametrize('residual', ['standard', 'hc', 'mhc', 'single pass'])
def test_a_memory_is_that_of_a_gpt_model(build, hybrid, step, residual):
    """Before attention. The hash is a layer's own, and here the one of the same layer of GPT."""
    from hybrid_models import in_hybrid, take_weights

    gpt = build(RESIDUALS[residual], engram={'layers': (1, 3), **MEMORY})
    engram = EngramConfig(layers=(in_hybrid(1), in_hybrid(3)), **MEMORY)
    same = hybrid('*-*-*-', RESIDUALS[residual], on_config={'engram_config': engram})
    randomise(gpt)
    take_weights(same, gpt)
    for layer, where in gpt.decoder.engram.addresses.items():
        same.decoder.engram.addresses[in_hybrid(layer)] = where
    references = assert_same_step(step, same, gpt)
    own = [gradient for name, gradient in references.items() if '.engram.' in name]
    assert len(own) == 2 * 7 and all(gradient.abs().max() > 0 for gradient in own)


@pytest.mark.parametrize('residual_type', ['standard', 'mhc'])
def test_a_memory_before_any_layer(hybrid, step, residual_type):
    """Of a Mamba layer, an MLP and an attention: 0 at the start, and it learns."""
    residual = {'residual_type': residual_type}
    engram = {'engram_config': EngramConfig(layers=(1, 2, 3), **MEMORY)}
    plain, model = (
        hybrid('M-*-', residual, **MIXERS, on_config=on_config) for on_config in ({}, engram)
    )
    (loss, gradients), (wanted, references) = step(model), step(plain)
    assert torch.equal(loss, wanted)
    for name, reference in references.items():
        assert torch.equal(gradients[name], reference), name
    for layer in (1, 2, 3):
        assert gradients[f'decoder.engram.layer_{layer}.value'].abs().max() > 0
    randomise(model)
    assert not torch.equal(step(model)[0], wanted)


MUDD = {'residual_type': 'mudd'}
DENSE = {'dynamic': MUDD, 'static': {**MUDD, 'mudd_variant': 'static'}}


@pytest.mark.parametrize('variant', DENSE)
@pytest.mark.parametrize('pattern', ['*-*-*-', '*E*E*E'])
def test_dense_connections_are_those_of_a_gpt_model(build, hybrid, step, variant, pattern):
    gpt, same = twins(build, hybrid, DENSE[variant], pattern)
    references = assert_same_step(step, same, gpt)
    own = [gradient for name, gradient in references.items() if 'dense_aggregates' in name]
    assert len(own) == {'dynamic': 3 * 3, 'static': 3}[variant]
    assert all(gradient.abs().max() > 0 for gradient in own)


def test_dense_connections_of_any_layers_start_as_the_plain_model(hybrid, step):
    plain, model = (hybrid('-M-E*-*M', r, **MIXERS, **MOE) for r in (None, MUDD))
    (loss, gradients), (wanted, references) = step(model), step(plain)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    name = 'decoder.layers.1.mixer.out_proj.weight'
    torch.testing.assert_close(gradients[name], references[name], rtol=1e-5, atol=1e-7)
    # After the MLP, Mamba's block, and two of attention, the first of which has an MLP; what comes
    # before Mamba has one way, and so has the final norm.
    assert [aggregate.ways for aggregate in model.decoder.dense_aggregates] == [1, 4, 4, 1, 1]
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == mudd_parameters(32, '-M-E*-*M', True, norm_vectors=2)


def test_a_dense_block_adds_up_what_the_blocks_before_it_put_out(hybrid, random_seed):
    """With static weights drawn at random; layers of the plain model say what a block puts out."""
    plain, model = (hybrid('M-*-M', r, **MIXERS) for r in (None, DENSE['static']))
    randomise(model)
    inputs = []

    def note(module, args, given):
        inputs.append((given['hidden_states'] if given else args[0]).detach())

    for module in (*model.decoder.layers, model.decoder.final_norm):
        module.register_forward_pre_hook(note, with_kwargs=True)
    model(torch.randint(0, 64, (2, 16)), torch.arange(16).expand(2, -1), None)
    history = [inputs[0]]
    # Blocks end with these layers, and the next layer reads the sum.
    for aggregate, last in zip(model.decoder.dense_aggregates, (1, 3, 4), strict=True):
        output = plain.decoder.layers[last](hidden_states=inputs[last], attention_mask=None)
        history.append(output[0] if isinstance(output, tuple) else output)
        weights = aggregate.bias.view(aggregate.ways, -1)[-1]
        wanted = sum(w * x for w, x in zip(weights, history, strict=True))
        torch.testing.assert_close(inputs[last + 1], wanted, rtol=1e-6, atol=1e-6)


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
    'full-single-pass': ({'single_pass': True}, FULL),
}


def assert_no_bit_changed(step, plain, other):
    for model in (plain, other):
        randomise(model)
    (loss, gradients), (wanted, references) = step(other), step(plain)
    assert torch.equal(loss, wanted) and gradients.keys() == references.keys()
    for name, reference in references.items():
        assert torch.equal(gradients[name], reference), name


@pytest.mark.parametrize('way', WAYS)
def test_recomputation_changes_no_bit(hybrid, step, way):
    residual, settings = WAYS[way]
    plain = hybrid('M*-G-', {**MHC, 'single_pass': 'single_pass' in residual}, **MIXERS)
    other = hybrid('M*-G-', {**MHC, **residual}, **MIXERS, **settings)
    assert_no_bit_changed(step, plain, other)


@pytest.mark.skipif(
    compat.core_minor(compat.core_version()) in ('0.18', *compat.PREVIEWED),
    reason='0.18 gives recomputed prediction layers, of GPT too, an argument they do not take; '
    'the next release builds none without Transformer Engine',
)
@pytest.mark.parametrize('residual', ['mhc', 'single pass'])
def test_recomputation_of_prediction_layers_changes_no_bit(hybrid, step, monkeypatch, residual):
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    monkeypatch.setattr(MTPLossLoggingHelper, 'tracker', {})
    rotary = {'position_embedding_type': 'rope', **ROTARY}
    plain = hybrid('*-*-/*-', RESIDUALS[residual], **rotary)
    other = hybrid('*-*-/*-', RESIDUALS[residual], **rotary, **{**FULL, 'recompute_num_layers': 1})
    assert_no_bit_changed(step, plain, other)


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


def test_every_layer_has_a_connection_of_its_own(hybrid, step):
    from hybrid_models import has_symbols

    from megatron_mhc.residual.hyper_connection import HyperConnection

    pattern, settings = ('ME+-', {**MOE, **LATENT}) if has_symbols('+') else ('ME*-', MOE)
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
    residual = {**MHC, 'mapping_weight_decay': True}
    engram = {'engram_config': EngramConfig(layers=(2,), **MEMORY)}
    model = hybrid('ME*-', residual, on_config=engram, **MIXERS, **MOE)
    groups = groups_of(model)
    assert groups['decoder.engram.layer_2.table.weight'] == 0
    own = {name: wd for name, wd in groups.items() if 'hyper_connection' in name}
    assert {name.split('.')[2] for name in own} == {'0', '1', '2', '3'}
    for name, multiplier in own.items():
        assert multiplier == (1.0 if name.endswith('mapping_proj.weight') else 0.0), name


def test_a_v_without_the_patch_that_places_its_stages_is_refused(hybrid):
    with pytest.raises(RuntimeError, match='no patch that gives a stage the layers of a V'):
        hybrid('*-', on_config={'pipeline_config': PipelineConfig('zb-v')})


def test_a_layout_beside_the_pattern_is_refused(hybrid):
    """It would place the prediction layer, and a copy of the embedding, on another rank."""
    layout = {'pipeline_model_parallel_size': 2, 'pipeline_model_parallel_layout': 'Ett|t|m|L'}
    with pytest.raises(ValueError, match='the pattern says itself which layers a stage has'):
        hybrid('*-*/*-', MHC, pipeline_dtype=torch.float32, batch_p2p_comm=False, **layout)
