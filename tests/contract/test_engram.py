"""Conditional memory in GPT models: equal at the start, and an independent reference after it."""

from __future__ import annotations

import math

import pytest
import torch

SMALL = {'ngram_orders': (2, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
KINDS = {
    'standard': None,
    'hc': {'residual_type': 'hc', 'num_residual_streams': 3},
    'mhc': {'residual_type': 'mhc', 'init': 'identity'},
}
SWIGLU = {
    'normalization': 'RMSNorm',
    'gated_linear_unit': True,
    'activation_func': torch.nn.functional.silu,
    'add_bias_linear': False,
    'bias_activation_fusion': False,
}
MOE = {
    'num_moe_experts': 4,
    'moe_router_topk': 2,
    'moe_token_dispatcher_type': 'alltoall',
    'moe_router_load_balancing_type': 'none',
    'add_bias_linear': False,
}


@pytest.fixture
def with_memory(build):
    """``with_memory(residual, engram settings, **others)`` -> a GPTModel with a memory."""

    def make(residual=None, engram=None, **settings):
        engram = {'layers': (2, 3), **SMALL, **(engram or {})}
        return build(residual, engram=engram, **settings)

    return make


def own(name):
    return '.engram.' in name


@torch.no_grad()
def randomise(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if own(name) or 'hyper_connection' in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('settings', [{}, SWIGLU, {'hidden_dropout': 0.3}], ids=str)
def test_start_is_the_plain_model(build, step, with_memory, kind, settings):
    """Bit for bit: loss, and the gradients of all that the plain model has."""
    plain = step(build(KINDS[kind], **settings))
    model = with_memory(KINDS[kind], **settings)
    loss, gradients = step(model)
    assert torch.equal(loss, plain[0])
    assert {name for name in gradients if not own(name)} == plain[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(gradients[name], gradient), name
    assert gradients['decoder.engram.layer_2.value.weight'].abs().max() > 1e-6


@pytest.mark.parametrize('kind', KINDS)
def test_every_weight_learns_after_the_first_step(step, with_memory, kind):
    model = with_memory(KINDS[kind])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    parameters = dict(model.named_parameters())
    for _ in range(2):
        _, gradients = step(model)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        optimizer.step()
    _, gradients = step(model)
    found = [name for name in gradients if own(name)]
    assert len(found) == 2 * 7
    for name in found:
        assert gradients[name].abs().max() > 1e-8, name


def reference_addition(model, number, streams, ids, positions):
    """The paper's formulas in fp64, token by token and head by head, with Python integers."""
    layer, engram = getattr(model.decoder.engram, f'layer_{number}'), model.decoder.engram.engram
    where = model.decoder.engram.addresses[number]
    length, batch, n, hidden = streams.shape
    weight = {name: p.detach() for name, p in layer.named_parameters()}

    def norm(x, gain):
        eps = model.config.layernorm_epsilon
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight[gain].view(n, hidden)

    retrieved = torch.zeros(length, batch, engram.dim, dtype=streams.dtype)
    for t in range(length):
        for b in range(batch):
            vectors = []
            for order_index, order in enumerate(engram.ngram_orders):
                number = 0
                for back in range(order):
                    if positions[b][t] >= back:
                        number ^= (ids[b][t - back] + 1) * where.multipliers[back]
                for head in range(engram.heads):
                    table = order_index * engram.heads + head
                    row = number % where.moduli[table] + sum(where.moduli[:table])
                    vectors.append(weight['table.weight'][row])
            retrieved[t, b] = torch.cat(vectors)
    value = retrieved @ weight['value.weight'].T
    key = (retrieved @ weight['key.weight'].T).view(length, batch, n, hidden)
    dot = (norm(streams, 'hidden_norm') * norm(key, 'key_norm')).sum(-1) / math.sqrt(hidden)
    gated = torch.sigmoid(dot)[..., None] * value[:, :, None]
    normed, mixed = norm(gated, 'convolution_norm'), torch.zeros_like(gated)
    for t in range(length):
        for tap in range(4):
            back = tap * engram.ngram_orders[-1]
            for b in range(batch):
                if positions[b][t] >= back:
                    mixed[t, b] += weight['convolution'][tap] * normed[t - back, b]
    return streams + torch.nn.functional.silu(mixed) + gated


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('documents', [False, True])
def test_layers_read_what_the_formulas_say(with_memory, kind, documents, random_seed):
    model = with_memory(KINDS[kind]).double()
    randomise(model, random_seed)
    tokens = torch.randint(0, 64, (2, 16))
    positions = torch.arange(16).expand(2, -1)
    if documents:
        positions = torch.stack([positions[0], torch.cat([torch.arange(5), torch.arange(11)])])
    seen = {}
    for number in (2, 3):
        before, layer = model.decoder.layers[number - 2 : number]
        before.register_forward_hook(lambda m, a, out, n=number: seen.update({n: out[0].detach()}))
        layer.register_forward_pre_hook(
            lambda m, a, k, n=number: seen.update({-n: k['hidden_states'].detach()}),
            with_kwargs=True,
        )
    model(tokens, positions, None)
    for number in (2, 3):
        streams = seen[number].unflatten(-1, (-1, 32))
        assert streams.shape[2] == {'standard': 1, 'hc': 3, 'mhc': 4}[kind]
        expected = reference_addition(model, number, streams, tokens.tolist(), positions.tolist())
        got = seen[-number].unflatten(-1, (-1, 32))
        assert (expected - streams).abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
