"""GPT models of every kind: stock equality, pre-norm equality, and an independent reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from layout_cases import MOE

from megatron_mhc import ResidualConfig, with_residual

# n = 2 streams with constant maps are the standard residual, bit for bit: halves of two equal
# streams sum exactly.
CONSTANT = {
    'num_residual_streams': 2,
    'fixed_mappings': ('pre', 'post', 'res'),
    'stream_merge': 'mean',
}
SWIGLU = {
    'normalization': 'RMSNorm',
    'gated_linear_unit': True,
    'activation_func': torch.nn.functional.silu,
    'add_bias_linear': False,
    'bias_activation_fusion': False,
}
KINDS = {
    'dense': {},
    'tied': {'tied': True},
    'swiglu': SWIGLU,
    'moe': MOE,
    'fp32-residual': {'fp32_residual_connection': True},
}


def block_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


def split_spec(config):
    """Attention-only and MLP-only layers in turn."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    whole = get_gpt_layer_local_spec()
    attention = dataclasses.replace(
        whole.submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
    )
    mlp = dataclasses.replace(
        whole.submodules,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
    )
    layers = [ModuleSpec(whole.module, submodules=s) for s in (attention, mlp, attention)]
    template = block_spec(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=template.layer_norm)


def mtp_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )

    return get_gpt_mtp_block_spec(config, get_gpt_layer_local_spec(), use_transformer_engine=False)


def base_weights_equal(model, other):
    base = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def assert_same_step(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=2e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
def test_constant_maps_are_the_standard_model(build, step, kind, residual_type):
    settings = dict(KINDS[kind])
    spec = block_spec if kind == 'moe' else None
    standard = build(spec=spec, **settings)
    widened = build({'residual_type': residual_type, **CONSTANT}, spec=spec, **settings)
    base_weights_equal(widened, standard)
    assert_same_step(step(widened), step(standard))


def position_mask_bda(training, fused):
    """Stock bias-dropout-add, but with the mask that F_post,res draws by position."""
    from megatron_mhc.kernels.reference.dropout import dropout_scale_ref, dropout_seed

    def apply(x_with_bias, residual, prob):
        x, bias = x_with_bias
        x = x if bias is None else x + bias
        if training:
            tokens, channels = x.shape[0] * x.shape[1], x.shape[2]
            x = x * dropout_scale_ref(tokens, channels, prob, dropout_seed(x.device)).view(x.shape)
        return residual + x

    return apply


@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
def test_constant_maps_with_dropout(build, step, residual_type):
    dropout = {'hidden_dropout': 0.3, 'attention_dropout': 0.0}
    widened = build({'residual_type': residual_type, **CONSTANT}, **dropout)
    plain = step(build(**{**dropout, 'hidden_dropout': 0.0}))
    standard = build(**dropout)
    for layer in standard.decoder.layers:
        layer.self_attn_bda = layer.mlp_bda = position_mask_bda
    got = step(widened)
    assert_same_step(got, step(standard))
    assert not torch.equal(got[0], plain[0])


@pytest.mark.parametrize('spec', [split_spec], ids=['split-layers'])
def test_constant_maps_in_unusual_layers(build, step, spec):
    standard, widened = build(spec=spec), build(CONSTANT, spec=spec)
    assert_same_step(step(widened), step(standard))


def test_constant_maps_with_multi_token_prediction(build, step):
    """The prediction layers behind the final norm stay single-stream."""
    standard = build(mtp_spec=mtp_spec, mtp_num_layers=1)
    widened = build(CONSTANT, mtp_spec=mtp_spec, mtp_num_layers=1)
    base_weights_equal(widened, standard)
    assert_same_step(step(widened), step(standard))


def test_standard_is_untouched(build, step):
    """With the patches in place, a model without settings is the stock one: class and numbers."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.registry import RESIDUAL_PATCHES

    patched = build()
    assert type(patched.decoder) is TransformerBlock
    with_patches = step(patched)
    engine.revert(RESIDUAL_PATCHES)
    try:
        stock = step(build())
    finally:
        engine.apply(RESIDUAL_PATCHES)
    assert torch.equal(with_patches[0], stock[0])
    for name, gradient in stock[1].items():
        assert torch.equal(with_patches[1][name], gradient), name


@pytest.mark.parametrize(
    'residual',
    [
        {'residual_type': 'hc'},
        {'residual_type': 'hc', 'hc_variant': 'static', 'num_residual_streams': 3},
        {'residual_type': 'hc', 'stream_merge': 'mean'},
        {'residual_type': 'mhc', 'init': 'uniform', 'init_gating_factor': 0.0},
        {'residual_type': 'mhc', 'init': 'prenorm'},
    ],
    ids=['hc', 'hc-static-3', 'hc-mean', 'mhc-uniform-alpha-0', 'mhc-prenorm'],
)
def test_start_is_pre_norm(build, residual):
    """At initialisation the normed output equals a pre-norm residual network's.

    eps is tiny because both scale hidden states by a constant, which only an exact norm removes.
    """
    standard = build(layernorm_epsilon=1e-12)
    widened = build(residual, layernorm_epsilon=1e-12)
    widened.load_state_dict(
        {**widened.state_dict(), **{k: v for k, v in standard.state_dict().items()}}
    )
    tokens = torch.randint(0, 64, (2, 16))
    positions = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        expected, got = (
            model.decoder(model.embedding(tokens, positions), None) for model in (standard, widened)
        )
    error = (got - expected).abs().max()
    print(f'largest difference of the normed output: {error:.1e}')
    assert expected.abs().max() > 1 and error < 1e-6


@pytest.mark.parametrize('merge', ['sum', 'mean'])
def test_output_projections_are_rescaled_where_streams_are_summed(build, merge):
    standard = build()
    widened = dict(build({'residual_type': 'hc', 'stream_merge': merge}).named_parameters())
    for name, parameter in standard.named_parameters():
        projection = name.endswith(('linear_proj.weight', 'linear_fc2.weight'))
        factor = math.sqrt(4) if projection and merge == 'sum' else 1.0
        torch.testing.assert_close(widened[name] * factor, parameter, msg=name)


@torch.no_grad()
def randomise(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if 'hyper_connection' in name or 'stream_merge' in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def mhc_maps(module, x, n):
    """Eq 14-19 with the norm first, rather than after the projection as the product has it."""
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    h = normed @ module.mapping_proj.weight.T
    pre, post, res = h.split([n, n, n * n], -1)
    b_pre, b_post, b_res = module.bias.split([n, n, n * n])
    m = (module.alpha_res * res + b_res).exp().unflatten(-1, (n, n))
    for _ in range(20):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return (
        torch.sigmoid(module.alpha_pre * pre + b_pre),
        2 * torch.sigmoid(module.alpha_post * post + b_post),
        m,
    )


def kronecker_maps(module, x, n):
    """Two doubly stochastic 2 x 2 matrices, each of one free number, for four streams."""
    h = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ module.mapping_proj.weight.T
    pre, post, res = h.split([n, n, 4], -1)
    b_pre, b_post, b_res = module.bias.split([n, n, 4])
    logits = module.alpha_res * res + b_res
    a = torch.sigmoid(logits[..., 0] - logits[..., 1])
    b = torch.sigmoid(logits[..., 2] - logits[..., 3])
    # Entry (i, j) is told by the digits in which i and j differ.
    values = [a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)]
    entries = [values[i ^ j] for i in range(4) for j in range(4)]
    return (
        torch.sigmoid(module.alpha_pre * pre + b_pre),
        2 * torch.sigmoid(module.alpha_post * post + b_post),
        torch.stack(entries, -1).unflatten(-1, (4, 4)),
    )


def hc_maps(module, x, n):
    """The paper's A_m, B and A_r^T, stream by stream."""
    streams = x.unflatten(-1, (n, -1))
    centred = streams - streams.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    t = torch.tanh(normed @ module.mapping_proj.weight.T)
    a_m, beta, a_r = module.bias.split([n, n, n * n])
    pre = module.alpha_width * t[..., 0] + a_m
    post = module.alpha_depth * t[..., 1] + beta
    res = module.alpha_width * t[..., 2:].transpose(-1, -2) + a_r.unflatten(-1, (n, n))
    return pre, post, res


def reference_loss(model, tokens, maps, n, merge, single_pass=False):
    """The model's own sublayers, joined by einsum over an explicit stream axis."""
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    h = model.embedding(tokens[:, :-1], positions)
    x = torch.stack([h] * n, dim=-2)
    left = [torch.eye(n, dtype=x.dtype)[0].expand(*x.shape[:2], n)]

    def connect(x, module, sublayer):
        pre, post, res = maps(module, x.flatten(-2), n)
        left.append(pre)
        if single_pass:
            pre = left[-2]
        y, bias = sublayer(torch.einsum('sbn,sbnc->sbc', pre, x))
        y = y if bias is None else y + bias
        return torch.einsum('sbij,sbjc->sbic', res, x) + torch.einsum('sbi,sbc->sbic', post, y)

    for layer in model.decoder.layers:
        x = connect(
            x,
            layer.self_attention_hyper_connection,
            lambda h, layer=layer: layer.self_attention(layer.input_layernorm(h), None),
        )
        x = connect(
            x,
            layer.mlp_hyper_connection,
            lambda h, layer=layer: layer.mlp(layer.pre_mlp_layernorm(h)),
        )
    # Called as a function, the final norm's own pre-hook (the product's merge) stays out.
    merged = x.sum(-2) if merge == 'sum' else x.mean(-2)
    if single_pass:
        merged = torch.einsum('sbn,sbnc->sbc', left[-1], x)
    logits, _ = model.output_layer(model.decoder.final_layernorm.forward(merged))
    return model.compute_language_model_loss(tokens[:, 1:].contiguous(), logits)


@pytest.mark.parametrize(
    ('residual', 'maps', 'merge'),
    [
        ({'residual_type': 'mhc'}, mhc_maps, 'mean'),
        ({'residual_type': 'mhc', 'init': 'identity'}, mhc_maps, 'mean'),
        ({'residual_type': 'mhc', 'num_residual_streams': 3}, mhc_maps, 'mean'),
        ({'residual_type': 'mhc', 'manifold': 'kronecker'}, kronecker_maps, 'mean'),
        ({'residual_type': 'mhc', 'single_pass': True}, mhc_maps, None),
        ({'residual_type': 'hc'}, hc_maps, 'sum'),
    ],
    ids=['mhc', 'mhc-identity', 'mhc-3', 'mhc-kronecker', 'mhc-single-pass', 'hc'],
)
def test_model_follows_an_independent_reference(build, step, residual, maps, merge):
    model = build(residual).double()  # so that only a different function can differ
    randomise(model)
    loss, gradients = step(model, seed=1)
    n = residual.get('num_residual_streams', 4)
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    single_pass = residual.get('single_pass', False)
    expected = reference_loss(model, tokens, maps, n, merge, single_pass)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.mean().backward()
    # Relative to the whole: the first sublayer's streams are equal, so its H_res has gradient 0.
    whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / whole
        assert error < 1e-10, (name, error)


def test_later_tokens_do_not_reach_earlier_ones(build):
    """Maps are per token: nothing is pooled over the sequence."""
    model = build({'residual_type': 'mhc', 'init': 'identity'})
    randomise(model)
    tokens = torch.randint(0, 64, (1, 16))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 64
    positions = torch.arange(16).unsqueeze(0)
    a, b = (model(t, positions, None) for t in (tokens, changed))
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_a_split_sequence_gives_the_same_maps_and_gradients(build):
    """Context parallelism: each rank sees its own tokens, and parameter gradients add up."""
    module = build({'residual_type': 'mhc'}).decoder.layers[0].mlp_hyper_connection
    streams = torch.randn(16, 2, 4 * 32)

    def run(parts):
        module.zero_grad()
        outputs = []
        for part in parts:
            _, read, carried = module(part)
            outputs.append(module.post(read, carried))
            outputs[-1].square().sum().backward()
        return torch.cat(outputs), [p.grad.clone() for p in module.parameters()]

    whole, whole_gradients = run([streams])
    halves, half_gradients = run(streams.chunk(2))
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-6)
    for a, b in zip(half_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_spec_transform_copies_and_is_idempotent(megatron):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_mhc.residual.layer import HyperConnectionTransformerLayer

    spec, residual = get_gpt_layer_local_spec(), ResidualConfig()
    widened = with_residual(spec, residual)
    assert spec.module is TransformerLayer and not spec.params
    assert widened.module is HyperConnectionTransformerLayer
    assert with_residual(widened, residual).module is HyperConnectionTransformerLayer
    assert with_residual(spec, ResidualConfig('standard')) is spec
    with pytest.raises(ValueError, match='no _forward_attention'):
        with_residual(ModuleSpec(MLP), residual)


def test_a_users_own_layer_class_is_widened(build, step):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Doubled(TransformerLayer):
        def _forward_mlp(self, hidden_states, *args, **kwargs):
            return 2 * super()._forward_mlp(hidden_states, *args, **kwargs)

    def spec(config):
        return dataclasses.replace(get_gpt_layer_local_spec(), module=Doubled)

    model = build({'residual_type': 'mhc'}, spec=spec)
    assert isinstance(model.decoder.layers[0], Doubled)
    assert step(model)[0].isfinite().all()
