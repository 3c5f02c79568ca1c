"""The Triton kernels inside GPT models: equal to the torch path, fused edges where they belong."""

from __future__ import annotations

import pytest
import torch
from layout_cases import MOE

from megatron_mhc.residual.hyper_connection import HyperConnection, Pending

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='these models are on the CPU; tests/kernels uses the GPU'
)
STREAMS = 2
SELECTIVE = {'recompute_granularity': 'selective', 'recompute_modules': ['core_attn', 'mlp']}
# name -> (residual settings, model settings, fused edges in three layers)
CASES = {
    'mhc': ({'init': 'identity'}, {}, 5),
    'four-streams': ({'num_residual_streams': 4, 'sinkhorn_iterations': 4}, {}, 5),
    'no-edge-fusion': ({'edge_fusion': False}, {}, 0),
    'learned-merge': ({'stream_merge': 'learned'}, {}, 5),
    'fixed-mappings': ({'fixed_mappings': ('post',)}, {}, 0),
    'single-pass': ({'single_pass': True, 'init': 'identity'}, {}, 0),
    'hc': ({'residual_type': 'hc'}, {}, 0),
    'dropout': ({}, {'hidden_dropout': 0.3}, 5),
    'moe': ({}, MOE, 5),
    'fp32-residual': ({}, {'fp32_residual_connection': True}, 5),
    # Fused edges between the sublayers of one layer only, in forward and again in recomputation.
    'full-recompute': (
        {},
        {
            'recompute_granularity': 'full',
            'recompute_method': 'uniform',
            'recompute_num_layers': 1,
            'hidden_dropout': 0.3,
        },
        6,
    ),
    'selective-recompute': (
        {},
        {**SELECTIVE, 'add_bias_linear': False},
        5,
    ),
}


def block_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


@pytest.fixture
def fused_edges(monkeypatch):
    """Counts the reads that came with a sublayer still to be written."""
    calls = []
    original = HyperConnection.forward

    def forward(self, x):
        calls.append(isinstance(x, Pending))
        return original(self, x)

    monkeypatch.setattr(HyperConnection, 'forward', forward)
    return calls


def assert_close_steps(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    whole = torch.cat([g.flatten() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() < 2e-6 * whole, name


@pytest.mark.parametrize('case', CASES)
def test_kernels_equal_torch(build, step, fused_edges, case):
    residual, settings, expected_edges = CASES[case]
    spec = block_spec if settings is MOE else None
    results = {}
    for backend in ('torch', 'triton'):
        fused_edges.clear()
        model = build({**residual, 'kernel_backend': backend}, spec=spec, **settings)
        results[backend] = step(model)
        assert sum(fused_edges) == (expected_edges if backend == 'triton' else 0)
    assert_close_steps(results['triton'], results['torch'])


def test_edge_fusion_changes_no_bit(build, step):
    fused, unfused = (
        step(build({'kernel_backend': 'triton', 'init': 'identity', 'edge_fusion': fusion}))
        for fusion in (True, False)
    )
    assert torch.equal(fused[0], unfused[0])
    for name, gradient in unfused[1].items():
        assert torch.equal(fused[1][name], gradient), name


def test_a_replaced_tensor_between_layers_takes_the_plain_path(build, step):
    """What was read ahead travels on the tensor itself, so it cannot be applied to another one."""
    model = build({'kernel_backend': 'triton', 'init': 'identity'})
    expected = step(model)
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda m, a, out: (out[0] * 1.0, *out[1:]))
    got = step(model)
    assert torch.equal(got[0], expected[0])
    assert_close_steps(got, expected)


def test_streams_used_twice_get_both_gradients(build, step):
    """A hook that reads the streams at a fused edge adds its own loss; none of it may be lost."""
    extra = {}
    for backend in ('torch', 'triton'):
        model = build({'kernel_backend': backend, 'init': 'identity'})
        seen = []
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
        tokens = torch.arange(16).unsqueeze(0)
        loss = model(tokens, tokens, None, labels=tokens).mean()
        loss = loss + sum(x.square().mean() for x in seen)
        loss.backward()
        extra[backend] = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    assert_close_steps(extra['triton'], extra['torch'])


def stream_chain(build, backend):
    """Three mHC layers without attention masks to think of, and a first stream tensor."""
    model = build({'kernel_backend': backend, 'init': 'identity'})
    x = torch.randn(16, 2, STREAMS * 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    return model, model.decoder.layers, x


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_checkpoint_around_some_layers_keeps_every_gradient(build, reentrant):
    """A checkpoint hands on tensors made without a graph; what was read with them is stale."""
    results = {}
    for backend in ('torch', 'triton'):
        model, layers, x = stream_chain(build, backend)

        def first(t, layers=layers):
            return layers[1](layers[0](t, None)[0], None)[0]

        y = torch.utils.checkpoint.checkpoint(first, x, use_reentrant=reentrant)
        layers[2](y, None)[0].square().sum().backward()
        gradients = {n: p.grad for n, p in layers.named_parameters()} | {'x': x.grad}
        results[backend] = torch.zeros(()), gradients
    assert_close_steps(results['triton'], results['torch'])


def test_streams_changed_in_place_between_layers_are_read_again(build):
    outputs = []
    for backend in ('torch', 'triton'):
        _, layers, x = stream_chain(build, backend)
        y = layers[0](x, None)[0]
        with torch.no_grad():
            y.add_(1)
        outputs.append(layers[1](y, None)[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def test_observed_streams_get_their_gradient(build):
    seen = []
    for backend in ('torch', 'triton'):
        _, layers, x = stream_chain(build, backend)
        y = layers[0](x, None)[0]
        y.retain_grad()
        layers[1](y, None)[0].square().sum().backward()
        seen.append(y.grad)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-4)
