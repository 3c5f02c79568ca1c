"""Every layout stores the same function: bits come back, and its own forward gives our maps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_mhc.convert.layouts import (
    LAYOUTS,
    Parameters,
    StoredLayout,
    Streams,
    from_tensors,
    own_layout,
    to_tensors,
)
from megatron_mhc.convert.maps import differences, maps, merge_gates, stored_head, stored_parameters
from megatron_mhc.convert.upcycle import upcycled
from megatron_mhc.kernels.reference.mapping import mapping_ref
from megatron_mhc.settings.residual import ResidualConfig

C, LAYERS, ITERATIONS = 8, 3, 20


def random_streams(
    n: int, learned: bool, spread: float = 1.0, layout: StoredLayout = LAYOUTS['mhc']
) -> Streams:
    """As if trained, of the kind that ``layout`` has."""

    def parameters(rows: int, gates: int) -> Parameters:
        phi = torch.randn(rows, n * C) / (n * C) ** 0.5
        return Parameters(phi, spread * torch.randn(rows), torch.rand(gates) + 0.5)

    rows = 2 * n + (n * n if layout.manifold == 'sinkhorn' else 0)
    alphas = layout.num_alpha
    layers = tuple((parameters(rows, alphas), parameters(rows, alphas)) for _ in range(LAYERS))
    streams = Streams(n, C, ITERATIONS, layers, parameters(n, 1) if learned else None)
    return dataclasses.replace(streams, single_pass=layout.single_pass, manifold=layout.manifold)


def read(tensors, layout, streams, *, stacked, learned):
    return from_tensors(
        tensors.__getitem__,
        layout,
        num_streams=streams.num_streams,
        hidden_size=C,
        num_layers=LAYERS,
        iterations=ITERATIONS,
        stacked=stacked,
        learned=learned,
    )


def assert_same(a: Streams, b: Streams) -> None:
    assert (a.head is None) == (b.head is None)
    first, second = ([p for layer in s.layers for p in layer] + [s.head or ()] for s in (a, b))
    for x, y in zip(first, second, strict=True):
        for part, other in zip(x, y, strict=True):
            assert torch.equal(part, other)


@pytest.mark.parametrize('stacked', [True, False])
@pytest.mark.parametrize('learned', [True, False])
@pytest.mark.parametrize('name', LAYOUTS)
def test_bits_come_back(name, learned, stacked, random_seed):
    layout = LAYOUTS[name]
    streams = random_streams(3, learned, layout=layout)
    if learned and layout.head is None:
        with pytest.raises(ValueError, match='no place for the learned merge'):
            to_tensors(streams, layout, stacked)
        return
    tensors = to_tensors(streams, layout, stacked)
    has_head = learned or layout.head_always
    assert list(tensors) == layout.owned(LAYERS, stacked, has_head)
    back = read(tensors, layout, streams, stacked=stacked, learned=has_head)
    assert_same(back, streams)


@pytest.mark.parametrize('name', LAYOUTS)
def test_own_forward_of_a_layout_gives_our_maps(name, random_seed):
    """With asymmetric logits, so that a transposed matrix would be another one."""
    layout, n = LAYOUTS[name], 4
    streams = random_streams(n, learned=layout.head is not None, layout=layout)
    tensors = to_tensors(streams, layout, stacked=False)
    x = torch.randn(16, n * C)
    # The mirror converges to the same matrix, only slowly.
    iterations = 1000 if name == 'megatron-main' else ITERATIONS
    for layer in range(LAYERS):
        for sublayer in range(2):
            own = streams.layers[layer][sublayer]
            ours = maps(own_layout(layout.manifold), x, own, n, iterations)
            if layout.manifold == 'sinkhorn':
                ours = mapping_ref(x, *own, num_streams=n, sinkhorn_iterations=iterations)
            stored = stored_parameters(tensors.get, layout, layer, sublayer)
            theirs = maps(layout, x, stored, n, iterations)
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).abs().max() < 1e-3
            if layout.manifold == 'identity':
                assert torch.equal(theirs[2], torch.eye(n).expand(16, n, n))
                continue
            assert (ours[2] - theirs[2].mT).abs().max() > 0.1
    if layout.head is not None:
        head = stored_head(tensors.get, layout, tensors)
        gates = merge_gates(layout, x, head, n, 1e-5)
        ours = merge_gates(LAYOUTS['mhc'], x, streams.head, n, 1e-5)
        assert torch.allclose(gates, ours, atol=2e-5)
        # Megatron's dev branch adds the eps of the model's norms to gates and norm.
        other = merge_gates(layout, x, head, n, 1e-2) - gates
        assert bool((other.abs() > 5e-3).all()) == (layout.numerics == 'megatron-dev')


def test_deepseek_v4_is_what_transformers_computes(random_seed):
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=C, hc_mult=4, rms_norm_eps=1e-6)
    module, merge = theirs.DeepseekV4HyperConnection(config), theirs.DeepseekV4HyperHead(config)
    for parameter in (*module.parameters(), *merge.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 4, C)
    layout, flat = LAYOUTS['deepseek-v4'], x.flatten(2)
    with torch.no_grad():
        post, comb, collapsed = module(x)
        stored = Parameters(module.fn, module.base, module.scale)
        h_pre, h_post, h_res = maps(layout, flat, stored, 4, config.hc_sinkhorn_iters)
        head = Parameters(merge.hc_fn, merge.hc_base, merge.hc_scale)
        merged = torch.einsum('...i,...ic->...c', merge_gates(layout, flat, head, 4, 1e-5), x)
        assert torch.allclose(h_post, post, atol=1e-6)
        # Used there as sum_j comb[j, k] x_j.
        assert torch.allclose(h_res, comb.mT, atol=1e-6)
        assert torch.allclose(torch.einsum('...i,...ic->...c', h_pre, x), collapsed, atol=1e-5)
        assert torch.allclose(merged, merge(x), atol=1e-5)


def test_glm_is_what_transformers_computes(random_seed):
    """Whose last step is the mean."""
    from transformers.models.glm5_next import modeling_glm5_next as theirs
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    config = Glm5NextTextConfig(hidden_size=C, hc_mult=4)
    module, layout = theirs.Glm5NextTextHyperConnection(config), LAYOUTS['glm-5.3']
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    # Streams in which the eps of the norm can be told.
    x = torch.randn(2, 5, 4, C) * 3e-3
    with torch.no_grad():
        post, comb, collapsed = module(x)
        stored = Parameters(module.fn, module.base, module.scale)
        passes, eps = config.hc_sinkhorn_iters, config.rms_norm_eps
        found = maps(layout, x.flatten(2), stored, 4, passes, eps)
        assert torch.allclose(found[1], post, atol=1e-6)
        assert torch.allclose(found[2], comb.mT, atol=1e-6)
        assert torch.allclose(torch.einsum('...i,...ic->...c', found[0], x), collapsed, atol=1e-7)
        other = maps(layout, x.flatten(2), stored, 4, passes, 1e-6)
        assert (other[1] - post).abs().max() > 1e-3
        gates = merge_gates(layout, x.flatten(2), None, 4, eps)
        merged = theirs.Glm5NextTextHyperHead()(x)
        assert torch.allclose(torch.einsum('...i,...ic->...c', gates, x), merged, atol=1e-8)


def test_hy4_is_what_transformers_computes(random_seed):
    """And what our own modules compute under its name, with the merge."""
    from transformers.models.hy_v4 import modeling_hy_v4 as theirs
    from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config

    from megatron_mhc.residual.mhc import ManifoldHyperConnection
    from megatron_mhc.residual.stream_merge import StreamMerge

    config = HYV4Config(hidden_size=C)
    module, merge = theirs.HYV4HyperConnection(config), theirs.HYV4HyperHead(config)
    for parameter in (*module.parameters(), *merge.parameters()):
        torch.nn.init.normal_(parameter)
    residual = ResidualConfig(manifold='identity', numerics='hy4')
    ours, our_merge = ManifoldHyperConnection(C, residual, 0), StreamMerge(C, residual)
    layout = LAYOUTS['hy4']
    names = [name for _, group in layout.sublayer_names(0) for name in group] + [*layout.head]
    stored = (module.fn, module.base, module.scale, merge.hc_fn, merge.hc_base, merge.hc_scale)
    tensors = dict(zip(names, (*stored[:3], *stored), strict=True))
    streams = from_tensors(
        *(tensors.__getitem__, layout),
        **{'num_streams': 4, 'hidden_size': C, 'num_layers': 1, 'iterations': 20},
        **{'stacked': False, 'learned': True},
    )
    x = torch.randn(2, 5, 4, C) * 3e-3
    y = torch.randn(2, 5, C)
    with torch.no_grad():
        for target, (phi, bias, alpha) in zip(
            (ours, our_merge), (streams.layers[0][0], streams.head), strict=True
        ):
            own = dict(target.named_parameters())
            own.pop('mapping_proj.weight').copy_(phi)
            own.pop('bias').copy_(bias)
            for parameter, value in zip(own.values(), alpha.split(1), strict=True):
                parameter.copy_(value)
        post, collapsed = module(x)
        _, u, carried = ours(x.flatten(2))
        assert torch.allclose(u, collapsed, atol=1e-8)
        written = post.unsqueeze(-1) * y.unsqueeze(-2) + x
        assert torch.allclose(ours.post(y, carried), written.flatten(2), atol=1e-6)
        assert torch.allclose(our_merge(x.flatten(2)), merge(x), atol=1e-8)
        found = maps(layout, x.flatten(2), Parameters(*stored[:3]), 4, 20, config.rms_norm_eps)
        assert torch.allclose(found[1], post, atol=1e-6)


def test_what_is_not_carried_over_has_a_size():
    """The mirror of a spread matrix is far off; an eps is not; a layout and itself are the same."""
    torch.manual_seed(0)
    # Under the eps of the others, what is left of H_post would be rounding alone.
    streams = dataclasses.replace(random_streams(4, learned=False, spread=4.0), norm_eps=1e-20)
    ours = LAYOUTS['mhc']
    mirror = differences(streams, ours, LAYOUTS['megatron-main'], 1e-5)
    eps = differences(streams, ours, LAYOUTS['megatron-dev'], 1e-5)
    assert mirror['H_res'] > 1e-2 > eps['H_post'] > eps['merge'] > 0
    assert mirror['H_pre'] < 1e-3
    assert set(differences(streams, ours, ours, 1e-5).values()) == {0.0}
    # Those with a configuration take the eps along.
    for name in ('deepseek-v4', 'glm-5.3', 'deepseek-v4.1'):
        assert differences(streams, ours, LAYOUTS[name], 1e-5)['H_post'] < eps['H_post'] / 10


@pytest.mark.parametrize('name', [name for name in LAYOUTS if name != 'mhc'])
def test_with_its_numerics_nothing_is_left_over(name, random_seed):
    """Of peaked maps, on the way there and back; under those of the paper there is a size."""
    theirs = LAYOUTS[name]
    ours = own_layout(theirs.manifold)
    streams = random_streams(4, learned=theirs.head is not None, spread=3.0, layout=theirs)
    same = dataclasses.replace(streams, numerics=theirs.numerics)
    for sides in ((ours, theirs), (theirs, ours)):
        assert max(differences(same, *sides, 1e-3).values()) < 2e-6
        apart = differences(streams, *sides, 1e-3)
        shown = 'H_pre' if theirs.manifold == 'identity' else 'H_res'
        assert apart[shown] > (5e-7 if theirs.manifold == 'identity' else 1e-5)
        assert (apart['merge'] > 1e-4) == (theirs.numerics == 'megatron-dev')


@pytest.mark.parametrize('stream_merge', ['mean', 'learned'])
def test_upcycled_maps_keep_equal_streams(stream_merge, random_seed):
    """H_pre and the merge sum to 1, H_post is 1, H_res doubly stochastic; reads are not uniform."""
    streams = upcycled(LAYERS, C, stream_merge=stream_merge, iterations=20)
    x = torch.randn(5, 4 * C)
    homes = []
    for own in (own for layer in streams.layers for own in layer):
        h_pre, h_post, h_res = mapping_ref(x, *own, num_streams=4)
        assert torch.allclose(h_pre.sum(-1), torch.ones(5), atol=1e-6)
        assert torch.equal(h_post, torch.ones(5, 4))
        for axis in (-1, -2):
            assert torch.allclose(h_res.sum(axis), torch.ones(5, 4), atol=1e-6)
        assert own.alpha.min() > 0
        homes.append(h_pre[0].argmax().item())
    assert homes == [0, 1, 2, 3, 0, 1]
    gates = merge_gates(LAYOUTS['mhc'], x, streams.head, 4, 1e-5)
    assert torch.allclose(gates, torch.full_like(gates, 0.25), atol=1e-6)


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'num_streams': 1}, '--mhc-num-residual-streams 1: wanted .* one stream'),
        ({'stream_merge': 'sum'}, '--mhc-stream-merge sum: .* choose mean or learned'),
        ({'init_gating_factor': 0.0}, '--mhc-init-gating-factor 0.0: wanted .* phi starts at 0'),
        ({'iterations': 0}, '--mhc-sinkhorn-iterations 0'),
        ({'noise': -1.0}, '--break-symmetry -1.0'),
    ],
)
def test_upcycling_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        upcycled(2, C, **wrong)


def test_noise_is_drawn_anew_for_every_sublayer():
    exact, noisy = upcycled(2, C), upcycled(2, C, noise=0.1)
    drawn = [
        b.bias - a.bias
        for plain, other in zip(exact.layers, noisy.layers, strict=True)
        for a, b in zip(plain, other, strict=True)
    ]
    assert 0.05 < torch.cat(drawn).std() < 0.2
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(noisy.layers[1][0].bias, upcycled(2, C, noise=0.1).layers[1][0].bias)
