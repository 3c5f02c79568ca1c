"""mHC of Megatron's main branch and ours: the same maps and the same layer, but for what is told.

What ``docs/migrating.md`` says of them, on their own modules. A core without them has no such test.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from block_models import SMALL

from megatron_mhc import ResidualConfig, ops
from megatron_mhc.convert.layouts import LAYOUTS, Parameters
from megatron_mhc.convert.maps import maps
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.residual.spec import with_residual
from megatron_mhc.residual.stream_merge import StreamMerge, expand_streams

theirs = pytest.importorskip(
    'megatron.core.transformer.hyper_connection',
    reason='this core has no hyper-connections of its own',
)
if not hasattr(theirs, 'HyperConnectionModule'):
    pytest.skip('another form of them than that of main', allow_module_level=True)

WIDTH, TOKENS, BATCH = 32, 5, 2
PAPER, CONVERGED = 20, 300
ROUNDING = {'rtol': 2e-5, 'atol': 2e-6}
CONNECTIONS = ('self_attention_hyper_connection', 'mlp_hyper_connection')


def config_of(n, iterations, **settings):
    from megatron.core.transformer.transformer_config import TransformerConfig

    mhc = {
        'enable_mhc_connections': True,
        'mhc_num_residual_streams': n,
        'mhc_sinkhorn_iterations': iterations,
    }
    return TransformerConfig(**{'num_layers': 1, **SMALL, **mhc, **settings})


def residual_of(n, iterations):
    return ResidualConfig('mhc', n, sinkhorn_iterations=iterations, init='uniform')


def streams(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, BATCH, n * WIDTH, generator=generator)


@torch.no_grad()
def drawn(module):
    """``module`` with maps that differ from token to token and are far from uniform."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(module.named_parameters()):
        if name.rpartition('.')[2].startswith('alpha'):
            parameter.fill_(0.5)
        elif name.rpartition('.')[2] == 'bias':
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture
def pair(megatron):
    """``pair(n, iterations)``: their module, and ours with its state as it is."""

    def make(n, iterations):
        module = drawn(theirs.HyperConnectionModule(config_of(n, iterations), 1))
        ours = ManifoldHyperConnection(WIDTH, residual_of(n, iterations), 0)
        ours.load_state_dict(module.state_dict())
        return module, ours

    return make


@pytest.mark.parametrize('n', [2, 4, 5])
def test_gates_are_theirs_and_h_res_is_the_same_limit(pair, n):
    module, ours = pair(n, CONVERGED)
    x = streams(n)
    for mine, other in zip(ours.all_maps(x), module.compute_mappings(x), strict=True):
        torch.testing.assert_close(mine, other, **ROUNDING)


@pytest.mark.parametrize('n', [2, 4, 5])
def test_twenty_steps_of_theirs_are_ours_of_the_transpose(megatron, n):
    """They end with columns, and we with rows, as the paper writes it."""
    logits = 3 * torch.randn(TOKENS, BATCH, n, n, generator=torch.Generator().manual_seed(2))
    wanted = theirs.SinkhornKnopp.apply(logits, PAPER)
    torch.testing.assert_close(ops.sinkhorn(logits.mT, PAPER).mT, wanted, **ROUNDING)
    columns = wanted.sum(-2)
    torch.testing.assert_close(columns, torch.ones_like(columns), **ROUNDING)
    rows = ops.sinkhorn(logits, PAPER).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), **ROUNDING)
    assert (ops.sinkhorn(logits, PAPER) - wanted).abs().max() > 1e-4


@pytest.mark.parametrize('n', [2, 4])
def test_what_convert_compares_with_is_theirs(pair, n):
    module, _ = pair(n, PAPER)
    x = streams(n)
    alphas = torch.cat([module.alpha_pre, module.alpha_post, module.alpha_res])
    stored = Parameters(module.mapping_proj.weight, module.bias, alphas)
    written = maps(LAYOUTS['megatron-main'], x, stored, n, PAPER)
    for mine, other in zip(written, module.compute_mappings(x), strict=True):
        torch.testing.assert_close(mine, other, **ROUNDING)


def test_the_norm_adds_eps_behind_the_root_there(pair):
    """Of a token as small as eps, its norm is larger there."""
    module, _ = pair(4, PAPER)
    x = 1e-6 * torch.ones(1, 1, 4 * WIDTH)
    _, scale = module._projection_and_get_norm(x)
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / 2e-6), **ROUNDING)


def layers(n, iterations, **settings):
    """One layer of theirs and the same of ours, with equal weights."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_layer import HyperConnectionTransformerLayer

    spec = get_gpt_layer_local_spec()
    connections = dict.fromkeys(CONNECTIONS, theirs.HyperConnectionModule)
    submodules = dataclasses.replace(spec.submodules, **connections)
    other = drawn(
        build_module(
            ModuleSpec(HyperConnectionTransformerLayer, submodules=submodules),
            config=config_of(n, iterations, **settings),
        )
    )
    plain = config_of(n, iterations, **settings, enable_mhc_connections=False)
    mine = build_module(with_residual(spec, residual_of(n, iterations)), config=plain)
    mine.load_state_dict(other.state_dict())
    return mine, other


@pytest.mark.parametrize('n', [2, 4])
def test_a_layer_and_its_gradients_are_theirs(megatron, n):
    mine, other = layers(n, CONVERGED)
    x = streams(n)
    mask = torch.ones(TOKENS, TOKENS).triu(1).bool()[None, None]
    results = []
    for layer in (mine, other):
        start = x.clone().requires_grad_()
        output, _ = layer(start, attention_mask=mask)
        (output * output.detach().cos()).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append((output, {'x': start.grad, **gradients}))
    (output, gradients), (wanted, references) = results
    torch.testing.assert_close(output, wanted, **ROUNDING)
    assert gradients.keys() == references.keys()
    whole = torch.cat([g.flatten() for g in references.values()]).norm()
    for name, reference in references.items():
        assert reference.abs().max() > 0, name
        # The limit is the same, and so is its gradient; no order of steps reaches it exactly.
        assert (gradients[name] - reference).norm() <= 1e-5 * whole, name


def test_both_ends_are_theirs(megatron):
    n = 4
    x = streams(n)
    one = x[..., :WIDTH].contiguous()
    module = theirs.HyperConnectionModule
    assert torch.equal(expand_streams(one, n), module.input_expand(one, n))
    merge = StreamMerge(WIDTH, residual_of(n, PAPER))
    torch.testing.assert_close(merge(x), module.output_contract(x, n), **ROUNDING)


def test_maps_of_16_bit_streams_are_in_16_bits_there_alone(pair):
    module, ours = pair(4, PAPER)
    x = streams(4).bfloat16()
    for mine, other in zip(ours.all_maps(x), module.bfloat16().compute_mappings(x), strict=True):
        assert mine.dtype == torch.float32 and other.dtype == torch.bfloat16
        torch.testing.assert_close(mine, other.float(), rtol=0, atol=0.05)


def test_dropout_has_a_mask_for_each_stream_there(pair):
    """Ours drops of a sublayer's output, theirs of what each stream gets of it."""
    n, rows = 4, 64
    module, _ = pair(n, PAPER)
    y, x = torch.ones(rows, BATCH, WIDTH), torch.zeros(rows, BATCH, n * WIDTH)
    h_post, h_res = torch.ones(rows, BATCH, n), torch.eye(n).repeat(rows, BATCH, 1, 1)
    torch.manual_seed(1)
    other = module.fused_h_res_h_post_bda(h_res, x, h_post, (y, None), 0.5, True, False)
    mine = ops.post_res(x, y, h_post, h_res, dropout=0.5)
    for written, as_one in ((other, False), (mine, True)):
        kept = written.unflatten(-1, (n, WIDTH)) != 0
        assert 0.4 < kept.float().mean() < 0.6
        assert torch.equal(kept, kept[:, :, :1].expand_as(kept)) == as_one


def test_their_flag_is_not_for_hybrid_models(megatron):
    """Attention and MLP layers refuse it; a Mamba layer is the standard one, without a word."""
    from hybrid_models import hybrid_model
    from layout_cases import MIXERS

    flag = {'enable_mhc_connections': True, **MIXERS}
    for pattern in ('*', '-'):
        with pytest.raises(ValueError, match='does not implement mHC residual streams'):
            hybrid_model(pattern, **flag)
    mamba = dict(hybrid_model('M', **flag).named_parameters())
    assert not any('hyper_connection' in name for name in mamba)
