"""HC and mHC modules by themselves: initialisation, precision, presets, merges, ablation values."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.residual.hc import UnconstrainedHyperConnection
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.residual.start import STARTS
from megatron_mhc.residual.stream_merge import StreamMerge, expand_streams
from megatron_mhc.settings.residual import INITS

HIDDEN = 16


def mhc(sublayer=1, hidden=HIDDEN, **settings):
    return ManifoldHyperConnection(hidden, ResidualConfig(**settings), sublayer)


def hc(sublayer=1, **settings):
    return UnconstrainedHyperConnection(
        HIDDEN, ResidualConfig(residual_type='hc', **settings), sublayer
    )


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
@pytest.mark.parametrize('variant', ['static', 'dynamic'])
def test_hc_starts_as_a_pre_norm_residual(n, variant, random_seed):
    """Every stream holds x + F(x): exactly, since W = 0, A_m = e_k, A_r = I, B = 1."""
    module = hc(sublayer=5, num_residual_streams=n, hc_variant=variant)
    x = torch.randn(3, 2, HIDDEN)
    streams = expand_streams(x, n)
    _, read, carried = module(streams)
    assert torch.equal(read, x)
    y = torch.randn_like(x)
    assert torch.equal(module.post(y, carried), expand_streams(x + y, n))


def test_hc_parameter_count_is_the_papers():
    """OLMo-1B, DHC x4: 394 048 more parameters on 32 sublayers of width 2048 (HC, table 7)."""
    module = UnconstrainedHyperConnection(2048, ResidualConfig(residual_type='hc'), 0)
    assert 32 * sum(p.numel() for p in module.parameters()) == 394_048
    static = hc(hc_variant='static')
    assert sum(p.numel() for p in static.parameters()) == 4 * (4 + 2)


@pytest.mark.parametrize('normalization', ['LayerNorm', 'RMSNorm'])
@pytest.mark.parametrize('tanh', [True, False])
def test_dynamic_hc_follows_the_paper(normalization, tanh, random_seed):
    """The (n+1) x (n+1) matrix of the paper, stream by stream, with its A_r^T."""
    n = 3
    residual = ResidualConfig(residual_type='hc', num_residual_streams=n, hc_tanh=tanh)
    module = UnconstrainedHyperConnection(
        HIDDEN, residual, 1, normalization=normalization, norm_eps=1e-5
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    h = torch.randn(n, HIDDEN, dtype=torch.float64)
    centre = h.mean(-1, keepdim=True) if normalization == 'LayerNorm' else 0
    normed = (h - centre) / ((h - centre).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    squash = torch.tanh if tanh else (lambda t: t)
    w_m, w_beta, w_r = module.mapping_proj.weight.split([1, 1, n])
    static_m, static_b, static_res = module.bias.split([n, n, n * n])
    a_m = module.alpha_width * squash(normed @ w_m.T).squeeze(-1) + static_m
    beta = module.alpha_depth * squash(normed @ w_beta.T).squeeze(-1) + static_b
    a_r = module.alpha_width * squash(normed @ w_r.T) + static_res.reshape(n, n).T
    layer = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
    expected_read = a_m @ h
    expected = torch.outer(beta, layer @ expected_read) + a_r.T @ h
    _, read, carried = module(h.flatten())
    torch.testing.assert_close(read, expected_read)
    torch.testing.assert_close(module.post(layer @ read, carried), expected.flatten())


def test_mhc_uniform_start():
    """Zero biases and alpha = 0: H_pre = 1/2, H_post = 1, H_res = 1/n, whatever the token."""
    module = mhc(init='uniform', init_gating_factor=0.0)
    pre, post, res = module.maps(torch.randn(5, 4 * HIDDEN))
    assert torch.equal(pre, torch.full_like(pre, 0.5))
    assert torch.equal(post, torch.ones_like(post))
    torch.testing.assert_close(res, torch.full_like(res, 0.25))


def test_mhc_identity_start_is_near_identity_with_one_home_stream():
    for sublayer in range(6):
        module = mhc(sublayer, init='identity')
        pre, post, res = module.maps(torch.randn(5, 4 * HIDDEN))
        assert (res - torch.eye(4)).abs().max() < 0.02
        home = sublayer % 4
        assert (pre.argmax(-1) == home).all() and pre[:, home].min() > 0.9
        assert (post.argmax(-1) == home).all()


@pytest.mark.parametrize('init', ['equal-writes', 'prenorm'])
def test_mhc_equal_writes_start_from_the_home_stream_and_write_to_all(init):
    module = mhc(sublayer=6, init=init, init_gating_factor=0.0)
    pre, post, res = module.maps(torch.randn(5, 4 * HIDDEN))
    others = 0.0474 if init == 'equal-writes' else 0.0474 / 3
    expected = torch.tensor([others, others, 0.9526, others]).expand(5, 4)
    torch.testing.assert_close(pre, expected, atol=1e-4, rtol=0)
    assert torch.equal(post, torch.ones(5, 4))
    assert (res - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize('n', [2, 3, 4, 8])
@pytest.mark.parametrize('manifold', ['sinkhorn', 'orthogonal'])
def test_mhc_prenorm_starts_as_a_pre_norm_residual(n, manifold, random_seed):
    """Every stream holds x + F(x), to rounding, whatever the token; phi learns from the start."""
    module = mhc(sublayer=5, num_residual_streams=n, manifold=manifold, init='prenorm')
    x, y = torch.randn(3, 2, HIDDEN), torch.randn(3, 2, HIDDEN)
    _, read, carried = module(expand_streams(x, n))
    torch.testing.assert_close(read, x)
    written = module.post(y, carried)
    torch.testing.assert_close(written, expand_streams(x + y, n))
    (read.sum() + written.square().sum()).backward()
    assert module.mapping_proj.weight.grad[: 2 * n].abs().min() > 0


def test_every_named_start_exists():
    assert tuple(STARTS) == INITS
    single = mhc(num_residual_streams=1, init='prenorm')
    assert single.bias.isfinite().all()


def test_initialisation_is_private_and_repeatable():
    """The same phi on every rank and layout, and no draw from the model's own generator."""
    torch.manual_seed(0)
    untouched = torch.rand(1)
    torch.manual_seed(0)
    first, second, other = mhc(3), mhc(3), mhc(4)
    assert torch.equal(torch.rand(1), untouched)
    assert torch.equal(first.mapping_proj.weight, second.mapping_proj.weight)
    assert not torch.equal(first.mapping_proj.weight, other.mapping_proj.weight)
    reseeded = mhc(3, seed=99)
    assert not torch.equal(first.mapping_proj.weight, reseeded.mapping_proj.weight)


def residual_gradient(init: str) -> float:
    """Gradient norm on the H_res biases of a 24-sublayer stack of toy layers at initialisation."""
    torch.manual_seed(0)
    modules = [mhc(k, hidden=64, init=init) for k in range(24)]
    layers = [torch.randn(64, 64) / 8 for _ in modules]
    streams = expand_streams(torch.randn(32, 64), 4)
    for module, layer in zip(modules, layers, strict=True):
        _, read, carried = module(streams)
        read = torch.nn.functional.rms_norm(read, (64,))
        streams = module.post(torch.tanh(read @ layer), carried)
    merged = StreamMerge(64, ResidualConfig())(streams)
    (torch.nn.functional.rms_norm(merged, (64,)) * torch.randn(32, 64)).sum().backward()
    return torch.stack([module.bias.grad[8:].norm() for module in modules]).norm().item()


def test_h_res_learns_under_identity_and_hardly_under_uniform():
    """Equal streams give H_res no gradient: its rows sum to 1, so mixing equals changes nothing."""
    uniform, identity = residual_gradient('uniform'), residual_gradient('identity')
    print(f'gradient norm on the H_res biases: uniform {uniform:.3e}, identity {identity:.3e}')
    assert identity > 1000 * uniform


@pytest.mark.parametrize('make', [mhc, hc])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_parameters_stay_in_fp32_bit_for_bit(make, dtype):
    module = make()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    for cast in (lambda m: m.to(dtype), lambda m: m.bfloat16(), lambda m: m.half()):
        cast(module)
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, before[name]), name
    streams = torch.randn(3, 4 * HIDDEN).to(dtype)
    _, read, carried = module(streams)
    h_post, h_res = carried.h_post, carried.h_res
    assert read.dtype == dtype and h_post.dtype == h_res.dtype == torch.float32
    assert module.post(read, carried).dtype == dtype


def test_only_phi_is_a_matrix():
    """Megatron decays what is not 1-D; neither biases nor gating factors may be."""
    for module in (mhc(), hc(), StreamMerge(HIDDEN, ResidualConfig(stream_merge='learned'))):
        matrices = [name for name, p in module.named_parameters() if p.dim() != 1]
        assert matrices == ['mapping_proj.weight']


def test_upstream_parameter_names():
    names = {name for name, _ in mhc().named_parameters()}
    assert names == {'mapping_proj.weight', 'bias', 'alpha_pre', 'alpha_post', 'alpha_res'}


@pytest.mark.parametrize('make', [mhc, hc])
@pytest.mark.parametrize('fixed', [('pre',), ('post', 'res'), ('pre', 'post', 'res')])
def test_fixed_mappings_take_their_ablation_values(make, fixed, random_seed):
    module = make(fixed_mappings=fixed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    streams = torch.randn(5, 4 * HIDDEN, requires_grad=True)
    _, read, carried = module(streams)
    h_post, h_res = carried.h_post, carried.h_res
    if 'pre' in fixed:
        torch.testing.assert_close(read, streams.unflatten(-1, (4, HIDDEN)).mean(-2))
    assert ('post' in fixed) == torch.equal(h_post, torch.ones(5, 4))
    assert ('res' in fixed) == torch.equal(h_res, torch.eye(4).expand(5, 4, 4))
    module.post(read, carried).square().sum().backward()
    # Overlapped gradient reduction waits for every parameter, so none may be left without one.
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize('n', [1, 2, 4])
def test_merges(n, random_seed):
    x = torch.randn(3, 2, HIDDEN)
    streams = expand_streams(x, n)
    settings = {'num_residual_streams': n}
    mean = StreamMerge(HIDDEN, ResidualConfig(stream_merge='mean', **settings))
    total = StreamMerge(HIDDEN, ResidualConfig(stream_merge='sum', **settings))
    assert torch.equal(mean(streams), x)
    torch.testing.assert_close(total(streams), n * x)
    learned = StreamMerge(
        HIDDEN, ResidualConfig(stream_merge='learned', init_gating_factor=0.0, **settings)
    )
    torch.testing.assert_close(learned(streams), n * x / 2)


def test_n_equal_one_is_the_plain_residual_of_mhc(random_seed):
    """The manifold of 1 x 1 matrices is {1} (mHC, section 4.1)."""
    module = mhc(num_residual_streams=1)
    x, y = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    _, _, carried = module(x)
    h_post, h_res = carried.h_post, carried.h_res
    assert torch.equal(h_res, torch.ones(4, 1, 1))
    torch.testing.assert_close(module.post(y, carried), x + h_post * y)


def test_composite_gain_stays_bounded(random_seed):
    """Forward gain of 60 composed maps is exactly 1: rows are normalised last (mHC, Eq 4 and 9)."""
    composite = torch.eye(4).expand(64, 4, 4)
    for sublayer in range(60):
        module = mhc(sublayer, init='identity', init_gating_factor=0.5)
        composite = module.maps(torch.randn(64, 4 * HIDDEN))[2] @ composite
    assert (composite.abs().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'residual_type': 'mHC'}, '--residual-type mHC'),
        ({'num_residual_streams': 0}, '--mhc-num-residual-streams 0'),
        ({'sinkhorn_iterations': -1}, '--mhc-sinkhorn-iterations -1'),
        ({'init_gating_factor': math.nan}, '--mhc-init-gating-factor nan'),
        ({'init': 'zeros'}, '--mhc-init zeros'),
        ({'stream_merge': 'max'}, '--mhc-stream-merge max'),
        ({'fixed_mappings': ('past',)}, '--mhc-fixed-mappings past'),
        ({'residual_type': 'hc', 'hc_variant': 'both'}, '--hc-variant both'),
        ({'residual_type': 'mhc', 'hc_variant': 'static'}, "hc_variant='static' has no effect"),
        ({'residual_type': 'hc', 'init': 'uniform'}, "init='uniform' has no effect"),
    ],
)
def test_settings_out_of_range_name_their_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        ResidualConfig(**settings)


@pytest.mark.parametrize('size', [1e20, 1e30, math.inf, math.nan])
@pytest.mark.parametrize('normalization', ['RMSNorm', 'LayerNorm'])
def test_hc_shows_a_norm_beyond_fp32(normalization, size, random_seed):
    """Zeros of the norm would pass for static maps."""
    module = UnconstrainedHyperConnection(
        HIDDEN, ResidualConfig('hc'), 0, normalization=normalization
    )
    x = torch.randn(3, 4 * HIDDEN)
    x[1] = x[1].sign() * size
    for h in module.maps(x):
        assert h[1].isnan().any() and h[0].isfinite().all() and h[2].isfinite().all()


@pytest.mark.parametrize('size', [1e20, math.inf, math.nan])
def test_learned_merge_and_dense_connections_show_a_norm_beyond_fp32(size, random_seed):
    from megatron_mhc.mudd.aggregate import DenseAggregate

    merge = StreamMerge(HIDDEN, ResidualConfig(stream_merge='learned'))
    dense = DenseAggregate(HIDDEN, 1, 1, True, 1e-5, 0, False)
    for module, width in ((merge, 4 * HIDDEN), (lambda x: dense((x, x))[0], HIDDEN)):
        x = torch.randn(3, width)
        x[1] = x[1].sign() * size
        out = module(x)
        assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
