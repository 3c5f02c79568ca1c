"""Dense connections (MUDD): the plain model at the start, a reference, exact counts."""

from __future__ import annotations

import pytest
import torch
from block_models import assert_follows
from test_gpt_model import MOE, SWIGLU

from megatron_mhc import ResidualConfig
from megatron_mhc.mudd.aggregate import WeighedSum
from megatron_mhc.mudd.layer import connect_densely
from megatron_mhc.mudd.sizes import mudd_flops, mudd_parameters
from megatron_mhc.sizing.flops import residual_flops

MUDD = {'residual_type': 'mudd'}
STATIC = {**MUDD, 'mudd_variant': 'static'}
GQA = {'num_query_groups': 2, 'add_qkv_bias': True, 'add_bias_linear': False}
KINDS = {
    'dense': {},
    'GQA': GQA,
    'wide heads': {'kv_channels': 16},
    'swiglu': SWIGLU,
    'moe': MOE,
    'tied': {'tied': True},
}


@torch.no_grad()
def randomise(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if 'dense_aggregates' in name or 'norm' in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('residual', [MUDD, STATIC], ids=['dynamic', 'static'])
def test_starts_as_the_plain_model(build, step, residual, kind):
    plain, model = build(**KINDS[kind]), build(residual, **KINDS[kind])
    base = dict(plain.named_parameters())
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    wanted, got = step(plain), step(model)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    for name, gradient in wanted[1].items():
        found = got[1][name]
        if '.input_layernorm.' in name:
            # Its twins for keys and values have the rest.
            found = sum(
                got[1][name.replace('.input_', f'.{way}_')] for way in ('input', 'key', 'value')
            )
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7, msg=name)
    own = [name for name in got[1] if 'dense_aggregates' in name]
    per_layer = 1 if residual is STATIC else 3
    assert len(own) == 3 * per_layer
    # W1 gets none while W2 is zero; all others learn from the first step.
    for name in own:
        assert bool(got[1][name].abs().max() > 0) == ('projection_in' not in name), name


def reference_loss(model, tokens, dynamic):
    """The equations layer by layer, every sum over a stack of all outputs."""
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    history = [model.embedding(tokens[:, :-1], positions)]
    query = key = value = residual = history[0]
    layers = model.decoder.layers
    for number, (layer, aggregate) in enumerate(
        zip(layers, model.decoder.dense_aggregates, strict=True), 1
    ):
        attention = layer.self_attention
        heads, groups = attention.config.num_attention_heads, attention.config.num_query_groups
        width = attention.hidden_size_per_attention_head

        def normed(norm, x, plain=torch.nn.functional.layer_norm):
            return plain(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)

        rows = attention.linear_qkv.weight.unflatten(0, (groups, heads // groups + 2, width))
        offsets = attention.linear_qkv.bias.unflatten(0, (groups, heads // groups + 2, width))
        s, b, _ = residual.shape

        def project(x, norm, first, last, rows=rows, offsets=offsets):
            weight, bias = rows[:, first:last], offsets[:, first:last]
            return torch.einsum('sbc,ghdc->sbghd', normed(norm, x), weight) + bias

        count = heads // groups
        q = project(query, layer.input_layernorm, 0, count)
        k = project(key, layer.key_layernorm, count, count + 1).expand_as(q)
        v = project(value, layer.value_layernorm, count + 1, count + 2).expand_as(q)
        scores = torch.einsum('sbghd,tbghd->bghst', q, k) / width**0.5
        causal = torch.ones(s, s, dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, -float('inf')).softmax(-1)
        mixed = torch.einsum('bghst,tbghd->sbghd', scores, v).flatten(2)
        out = mixed @ attention.linear_proj.weight.T
        if attention.linear_proj.bias is not None:
            out = out + attention.linear_proj.bias
        middle = residual + out
        y, bias = layer.mlp(normed(layer.pre_mlp_layernorm, middle))
        history.append(middle + (y if bias is None else y + bias))

        ways = 1 if number == len(layers) else 4
        weights = aggregate.bias.view(ways, number + 1)
        if dynamic:
            x = history[-1]
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            inner = x @ aggregate.projection_in.weight.T
            inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            outputs = inner @ aggregate.projection_out.weight.T
            weights = weights + outputs.unflatten(-1, (ways, number + 1))
        else:
            weights = weights.expand(s, b, -1, -1)
        *others, residual = torch.einsum('sbwj,jsbc->wsbc', weights, torch.stack(history)).unbind(0)
        if others:
            query, key, value = others
    logits, _ = model.output_layer(model.decoder.final_layernorm(residual))
    return model.compute_language_model_loss(tokens[:, 1:].contiguous(), logits)


@pytest.mark.parametrize('settings', [{}, GQA], ids=['heads', 'groups'])
@pytest.mark.parametrize('residual', [MUDD, STATIC], ids=['dynamic', 'static'])
def test_model_follows_an_independent_reference(build, step, residual, settings):
    model = build(residual, **settings).double()
    randomise(model)
    assert_follows(model, step, lambda tokens: reference_loss(model, tokens, residual is MUDD))


def test_weighed_sum_has_the_right_gradients(random_seed):
    weights = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    history = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(WeighedSum.apply, (weights, *history))


def test_aggregates_stay_fp32_and_add_up_in_fp32(build, random_seed):
    model = build(MUDD).bfloat16()
    aggregate = model.decoder.dense_aggregates[1]
    assert {p.dtype for p in aggregate.parameters()} == {torch.float32}
    history = tuple(torch.randn(4, 2, 32).bfloat16() for _ in range(3))
    with torch.no_grad():
        aggregate.bias.copy_(torch.randn_like(aggregate.bias))
    weights = aggregate.bias.view(4, 3).double()
    for got, way in zip(aggregate(history), weights, strict=True):
        truth = sum(w * x.double() for w, x in zip(way, history, strict=True))
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, truth.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize('variant', ['dynamic', 'static'])
@pytest.mark.parametrize('kind', ['dense', 'swiglu'])
def test_parameters_are_counted_exactly(build, kind, variant):
    """Measured on built models; RMSNorm has one vector, LayerNorm two."""
    plain = build(**KINDS[kind])
    model = build({**MUDD, 'mudd_variant': variant}, **KINDS[kind])
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == mudd_parameters(32, '***', variant == 'dynamic', 1 if kind == 'swiglu' else 2)


def test_overhead_is_the_papers():
    """Table 1 and section 3.4 at 2.8B: 32 layers of 2560, sequence 2048."""
    hidden, layers, tokens = 2560, 32, 2048
    eta, rho = (layers + 3) / hidden, tokens / hidden
    assert f'{eta / 6:.2%}' == '0.23%'
    assert f'{eta / (3 + rho / 4):.1%}' == '0.4%'
    # The paper counts W1 alone: W2 and the norms of keys and values come to 6 % of it here.
    total = mudd_parameters(hidden, '*' * layers, dynamic=True)
    inner = [4 * (layer + 1) for layer in range(1, layers + 1)]
    assert hidden * sum(inner) / (12 * layers * hidden**2) == pytest.approx(eta / 6, rel=1e-12)
    small = sum(k * k for k in inner) + sum(inner) + 2 * layers * hidden
    # After the last layer there is one way instead of four.
    last = (layers + 1) * 3
    assert total == hidden * sum(inner) + small - last * (inner[-1] + 1)
    flops = mudd_flops(hidden, '*' * layers, dynamic=True)
    assert residual_flops(ResidualConfig('mudd'), hidden, 2 * layers) == flops
    # Attention over a causal mask: half of 4 T C a layer.
    plain = 24 * layers * hidden**2 + 2 * layers * tokens * hidden
    assert f'{flops / plain:.1%}' == '0.4%'
    assert flops / plain == pytest.approx(eta / (3 + rho / 4), rel=0.03)
    static = total - hidden * sum(inner) - sum(k * k for k in inner) + last * inner[-1]
    assert mudd_parameters(hidden, '*' * layers, dynamic=False) == static


def test_an_input_that_lost_its_history_is_refused(build):
    model = build(MUDD)
    x = torch.randn(8, 2, 32)
    with pytest.raises(RuntimeError, match='layer 2: the outputs of earlier layers did not arrive'):
        model.decoder.layers[1](hidden_states=x, attention_mask=None)


def test_another_attention_is_refused(build):
    block = build().decoder
    block.layers[2].self_attention.linear_qkv = torch.nn.Linear(32, 96)
    with pytest.raises(ValueError, match='layer 3 has SelfAttention with Linear'):
        connect_densely(block, ResidualConfig('mudd'))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'multi_latent_attention': True}, '--multi-latent-attention'),
        ({'recompute_granularity': 'full'}, '--recompute-granularity full'),
        ({'mtp_num_layers': 1}, '--mtp-num-layers'),
    ],
)
def test_what_the_model_config_refuses(settings, message):
    from types import SimpleNamespace

    from megatron_mhc.settings.refusals import check_residual

    with pytest.raises(ValueError, match=message):
        check_residual(SimpleNamespace(**settings), ResidualConfig('mudd'))
