"""Every layout stores the same function: bits come back, and its own forward gives our maps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_mhc.convert.layouts import LAYOUTS, Parameters, Streams, from_tensors, to_tensors
from megatron_mhc.convert.maps import differences, maps, merge_gates, stored_head, stored_parameters
from megatron_mhc.convert.upcycle import upcycled
from megatron_mhc.kernels.reference.mapping import mapping_ref

C, LAYERS, ITERATIONS = 8, 3, 20


def random_streams(n: int, learned: bool, spread: float = 1.0) -> Streams:
    def parameters(rows: int, gates: int) -> Parameters:
        phi = torch.randn(rows, n * C) / (n * C) ** 0.5
        return Parameters(phi, spread * torch.randn(rows), torch.rand(gates) + 0.5)

    layers = tuple(
        (parameters(n * n + 2 * n, 3), parameters(n * n + 2 * n, 3)) for _ in range(LAYERS)
    )
    return Streams(n, C, ITERATIONS, layers, parameters(n, 1) if learned else None)


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
    streams = random_streams(3, learned)
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
    streams = random_streams(n, learned=layout.head is not None)
    tensors = to_tensors(streams, layout, stacked=False)
    x = torch.randn(16, n * C)
    # The mirror converges to the same matrix, only slowly.
    iterations = 1000 if name == 'megatron-main' else ITERATIONS
    for layer in range(LAYERS):
        for sublayer in range(2):
            own = streams.layers[layer][sublayer]
            ours = mapping_ref(x, *own, num_streams=n, sinkhorn_iterations=iterations)
            stored = stored_parameters(tensors.get, layout, layer, sublayer)
            theirs = maps(layout, x, stored, n, iterations)
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).abs().max() < 1e-3
            assert (ours[2] - theirs[2].mT).abs().max() > 0.1
    if layout.head is not None:
        head = stored_head(tensors.get, layout, tensors)
        gates = merge_gates(layout, x, head, n, 1e-5)
        ours = merge_gates(LAYOUTS['mhc'], x, streams.head, n, 1e-5)
        assert torch.allclose(gates, ours, atol=2e-5)
        # Megatron's dev branch adds the eps of the model's norms to gates and norm.
        other = merge_gates(layout, x, head, n, 1e-2) - gates
        assert bool((other.abs() > 5e-3).all()) == (name == 'megatron-dev')


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


def test_what_is_not_carried_over_has_a_size():
    """The mirror of a spread matrix is far off; an eps is not; a layout and itself are the same."""
    torch.manual_seed(0)
    # Under the eps of the others, what is left of H_post would be rounding alone.
    streams = dataclasses.replace(random_streams(4, learned=False, spread=4.0), norm_eps=1e-20)
    ours = LAYOUTS['mhc']
    mirror = differences(streams, ours, LAYOUTS['megatron-main'], 1e-5)
    eps = differences(streams, ours, LAYOUTS['deepseek-v4'], 1e-5)
    assert mirror['H_res'] > 1e-2 > eps['H_post'] > eps['merge'] > 0
    assert mirror['H_pre'] < 1e-3
    assert set(differences(streams, ours, ours, 1e-5).values()) == {0.0}
    same = dataclasses.replace(streams, norm_eps=1e-6)
    assert differences(same, ours, LAYOUTS['deepseek-v4'], 1e-5)['H_post'] < eps['H_post'] / 10


@pytest.mark.parametrize('name', [name for name in LAYOUTS if name != 'mhc'])
def test_with_its_numerics_nothing_is_left_over(name, random_seed):
    """Of peaked maps, on the way there and back; under those of the paper there is a size."""
    ours, theirs = LAYOUTS['mhc'], LAYOUTS[name]
    streams = random_streams(4, learned=theirs.head is not None, spread=3.0)
    same = dataclasses.replace(streams, numerics=name)
    for sides in ((ours, theirs), (theirs, ours)):
        assert max(differences(same, *sides, 1e-3).values()) < 2e-6
        apart = differences(streams, *sides, 1e-3)
        assert apart['H_res'] > 1e-5
        assert (apart['merge'] > 1e-4) == (name == 'megatron-dev')


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
