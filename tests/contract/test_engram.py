"""Conditional memory in GPT models: equal at the start, and an independent reference after it."""

from __future__ import annotations

import math

import pytest
import torch
from layout_cases import MOE

from megatron_mhc.settings.engram import EngramConfig

SMALL = {'ngram_orders': (2, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
KINDS = {
    'standard': None,
    'hc': {'residual_type': 'hc', 'num_residual_streams': 3},
    'mhc': {'residual_type': 'mhc', 'init': 'identity'},
    'single-pass': {'residual_type': 'mhc', 'init': 'identity', 'single_pass': True},
}
SWIGLU = {
    'normalization': 'RMSNorm',
    'gated_linear_unit': True,
    'activation_func': torch.nn.functional.silu,
    'add_bias_linear': False,
    'bias_activation_fusion': False,
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
@pytest.mark.parametrize(
    'settings',
    [{}, SWIGLU, {'hidden_dropout': 0.3}, {'layernorm_epsilon': 1e-20}],
    ids=['dense', 'swiglu', 'dropout', 'tiny-eps'],
)
def test_start_is_the_plain_model(build, step, with_memory, kind, settings):
    """Bit for bit: loss, and the gradients of all that the plain model has."""
    plain = step(build(KINDS[kind], **settings))
    model = with_memory(KINDS[kind], **settings)
    loss, gradients = step(model)
    assert torch.equal(loss, plain[0])
    assert {name for name in gradients if not own(name)} == plain[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(gradients[name], gradient), name
    assert gradients['decoder.engram.layer_2.value'].abs().max() > 1e-6


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
    value = retrieved @ weight['value'].T
    key = (retrieved @ weight['key'].T).view(length, batch, n, hidden)
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
        assert streams.shape[2] == {'standard': 1, 'hc': 3}.get(kind, 4)
        expected = reference_addition(model, number, streams, tokens.tolist(), positions.tolist())
        got = seen[-number].unflatten(-1, (-1, 32))
        assert (expected - streams).abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def moe_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


def mtp_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )

    return get_gpt_mtp_block_spec(config, get_gpt_layer_local_spec(), use_transformer_engine=False)


OTHERS = {
    'moe': {'spec': moe_spec, **MOE},
    'mtp': {'mtp_spec': mtp_spec, 'mtp_num_layers': 1},
    'tied': {'tied': True},
    'fp32-residual': {'fp32_residual_connection': True},
}


@pytest.mark.parametrize('other', OTHERS)
def test_start_of_other_models(build, step, with_memory, other):
    plain = step(build(KINDS['mhc'], **OTHERS[other]))
    loss, gradients = step(with_memory(KINDS['mhc'], **OTHERS[other]))
    assert torch.equal(loss, plain[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradients[name], gradient), name


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0]) and got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


@pytest.fixture
def changed(step, with_memory):
    """``changed(residual, **settings)``: a step of a model whose memory matters."""

    def run(residual, **settings):
        model = with_memory(residual, **settings)
        randomise(model)
        return step(model)

    return run


@pytest.mark.parametrize('kind', ['standard', 'mhc'])
def test_selective_recomputation_changes_no_bit(changed, kind):
    selective = {'recompute_granularity': 'selective', 'recompute_modules': ['core_attn', 'mlp']}
    plain, again = (
        changed(KINDS[kind], add_bias_linear=False, **settings) for settings in ({}, selective)
    )
    assert_same(again, plain)


@pytest.mark.parametrize('blocks', [1, 3, 'auto', 'stage'])
@pytest.mark.parametrize('kind', ['hc', 'mhc'])
def test_block_recompute_changes_no_bit(changed, kind, blocks):
    plain = changed(KINDS[kind])
    assert_same(changed({**KINDS[kind], 'recompute_layer_num': blocks}), plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason='interpreted: the model is on the CPU')
def test_kernels_read_streams_after_the_memory(changed):
    """Nothing is read ahead for a layer with a memory: it would be read again."""
    torch_path, kernels = (
        changed({**KINDS['mhc'], 'kernel_backend': backend}, engram={'layers': (2,)}, num_layers=2)
        for backend in ('torch', 'triton')
    )
    torch.testing.assert_close(kernels[0], torch_path[0], rtol=1e-5, atol=1e-5)
    whole = torch.cat([g.flatten() for g in torch_path[1].values()]).norm()
    for name, gradient in torch_path[1].items():
        assert (kernels[1][name] - gradient).norm() < 2e-6 * whole, name


def test_nothing_is_read_ahead_for_a_layer_with_a_memory(with_memory):
    first, second, _ = with_memory(KINDS['mhc'], engram={'layers': (2,)}).decoder.layers
    assert first.following == () and len(second.following) == 1


class Ranks:
    """Stands in for a process group of two where nothing is sent."""

    def __init__(self, rank, size):
        self.rank, self.size = (lambda: rank), (lambda: size)
        self.tp = self


def test_tables_start_alike_on_any_number_of_ranks(with_memory):
    from megatron_mhc.engram.table import EngramTable

    model = with_memory()
    settings = model.decoder.engram.engram
    whole, *halves = (
        EngramTable(settings, 2, model.config, Ranks(rank, size)).weight
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(whole, model.decoder.engram.layer_2.table.weight)
    assert not torch.equal(whole, model.decoder.engram.layer_3.table.weight)
    assert whole.std().item() == pytest.approx(model.config.init_method_std, rel=0.1)


def test_later_tokens_do_not_reach_earlier_ones(with_memory):
    model = with_memory(KINDS['mhc'])
    randomise(model)
    tokens, positions = torch.randint(0, 64, (1, 16)), torch.arange(16)[None]
    other = tokens.clone()
    other[0, 11] = (other[0, 11] + 1) % 64
    a, b = (model(given, positions, None) for given in (tokens, other))
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.equal(a[:, 11:], b[:, 11:])


def test_values_do_not_draw_from_the_models_random_stream(build, with_memory):
    states = []
    for make in (build, with_memory):
        make()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_layers_that_run_without_token_ids_say_so(with_memory):
    model = with_memory()
    hidden = model.embedding(torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None])
    for _ in range(2):
        with pytest.raises(RuntimeError, match='layer 2 ran without the ids of its tokens'):
            model.decoder(hidden, None)
        # What it leaves has been used up.
        model(torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None], None)


def test_packed_documents_are_told_apart_by_their_bounds(with_memory):
    from megatron_mhc.engram.tokens import placed

    memory = with_memory().decoder.engram
    tokens = torch.randint(0, 64, (1, 16))
    found = []
    for positions, bounds in (
        ([*range(16)], torch.tensor([0, 5, 6, 13], dtype=torch.int32)),
        ([*range(5), 0, *range(7), *range(3)], None),
    ):
        memory.note(placed(memory.token_map[tokens], torch.tensor([positions]), bounds))
        found.append(memory._noted)
    for number in (2, 3):
        for packed, restarted in zip(*(noted[number][:2] for noted in found), strict=True):
            assert torch.equal(packed, restarted)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_survive_the_way_to_the_next_stage(dtype, random_seed):
    from megatron_mhc.engram import tokens

    group, engram = Ranks(0, 1), EngramConfig((2,))
    x = torch.randn(7, 2, 12, dtype=dtype, requires_grad=True)
    ids = torch.randint(1, tokens.LARGEST_ID, (2, 7))
    given = tokens.Tokens(ids, torch.arange(7).expand(2, -1))
    message = tokens.sent(x, given, group, False)
    assert message.shape == (7, 2, 12 + engram.edge_values(dtype.itemsize))
    assert message.isfinite().all()
    arrived = message.detach().requires_grad_()
    streams, found = tokens.received(arrived, engram, group, False)
    assert torch.equal(streams, x)
    for got, expected in zip(found, given, strict=True):
        assert torch.equal(got, expected)
    gradient = torch.randn_like(x)
    streams.backward(gradient)
    message.backward(arrived.grad)
    assert torch.equal(x.grad, gradient)


def test_inference_that_cannot_be_followed_is_refused(with_memory):
    from megatron.core.inference.contexts import StaticInferenceContext

    model = with_memory().eval()
    tokens, positions = torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None]
    context = StaticInferenceContext(1, 32)
    context.sequence_len_offset = 3
    with pytest.raises(RuntimeError, match='begins with token 3 of 1 sequences, and the tokens'):
        model(tokens, positions, None, inference_context=context)
    context.is_static_batching = lambda: False
    with pytest.raises(NotImplementedError, match='--engram-layers: dynamic batches do not keep'):
        model(tokens, positions, None, inference_context=context)
    for name in ('pipeline_model_parallel_size', 'tensor_model_parallel_size'):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NotImplementedError) as raised:
            patch.setattr(model.config, name, 2)
            patch.setattr(model.config, 'sequence_parallel', True)
            model(tokens, positions, None, inference_context=StaticInferenceContext(1, 16))
        assert str(raised.value).startswith('--engram-layers: inference with --')
    with pytest.raises(ValueError, match='without input_ids'):
        model(None, positions, None, decoder_input=torch.zeros(16, 1, 32))


def test_beam_search_takes_what_is_kept_along(with_memory):
    from megatron.core.inference.contexts import StaticInferenceContext

    model = with_memory(KINDS['hc']).eval()
    randomise(model)
    tokens, positions = torch.randint(0, 64, (2, 7)), torch.arange(7).expand(2, -1)
    mask = torch.ones(6, 6).triu(1).bool()[None, None]
    following = []
    for order in ([0, 1], [1, 0]):
        context = StaticInferenceContext(2, 16)
        with torch.no_grad():
            # 0.17 computes no logits that are not gathered.
            given = {'inference_context': context, 'runtime_gather_output': True}
            model(tokens[:, :6], positions[:, :6], mask, **given)
            context.sequence_len_offset = 6
            context.enable_decode_mode()
            context.swap_key_value_dict(torch.tensor(order))
            step = tokens[order, 6:], positions[:, 6:], None
            following.append(model(*step, **given))
    assert torch.equal(following[1], following[0][[1, 0]])
