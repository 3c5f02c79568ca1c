"""Monitors on real layers: what is noted, how often, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from megatron_mhc.settings.flags_monitor import MonitorConfig

MHC = {'residual_type': 'mhc', 'init': 'identity'}
FIXED = {'residual_type': 'mhc', 'fixed_mappings': ['pre', 'post', 'res']}
STATIC = {'residual_type': 'hc', 'hc_variant': 'static'}
FULL = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 1}
KINDS = ('streams', 'maps', 'outputs')


@pytest.fixture
def watch(megatron):
    """``watch(model, ...)`` -> a monitor whose step is ``monitor.now``."""
    from megatron_mhc.monitor.collect import Monitor

    def attach(model, alarm='off', interval=1):
        settings = MonitorConfig(interval=interval, tokens=1000, alarm=alarm)
        monitor = Monitor([model], settings, lambda: monitor.now)
        monitor.now = 1
        return monitor

    return attach


def reported(monitor, streams=4):
    from megatron_mhc.monitor.reduce import gather

    sampled = monitor.is_due(monitor.now)
    return gather(monitor, layers=3, streams=streams, sampled=sampled, loss_scale=1.0)


@pytest.mark.parametrize('residual', [MHC, FIXED, STATIC, {'residual_type': 'hc'}])
def test_what_is_measured_is_what_ran(build, step, watch, residual):
    """Against the maps of each sublayer for the streams that it was given."""
    model = build(residual)
    streams = {}
    for layer in model.decoder.layers:
        for name in ('self_attention_hyper_connection', 'mlp_hyper_connection'):
            connection = getattr(layer, name)
            connection.register_forward_pre_hook(
                lambda module, args: streams.update({module: args[0].detach()})
            )
    monitor = watch(model)
    step(model)
    report = reported(monitor)
    assert report.pipeline_rank.tolist() == [0] * 6
    for row, connection in enumerate(monitor.connections):
        x = streams[connection]
        h_pre, h_post, h_res = (m.double().detach() for m in connection.all_maps(x))
        wanted = {
            'amax-gain-forward': h_res.abs().sum(-1).amax(-1).mean(),
            'amax-gain-backward': h_res.abs().sum(-2).amax(-1).mean(),
            'pre-max': h_pre.max(),
            'post-min': h_post.min(),
            'stream-rms': x.unflatten(-1, (4, -1)).square().mean(-1).sqrt().mean(),
        }
        for name, value in wanted.items():
            assert report.metrics[name][row] == pytest.approx(value.item(), rel=1e-5), (row, name)
        assert torch.allclose(report.h_res[row], h_res.mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_static_maps_are_those_before_the_optimizer_step(build, step, watch):
    model = build(STATIC)
    monitor = watch(model)
    step(model)
    with torch.no_grad():
        for connection in monitor.connections:
            connection.bias.add_(100)
    metrics = reported(monitor).metrics
    assert max(metrics[name].max() for name in ('pre-max', 'post-max', 'amax-gain-forward')) == 1


@pytest.mark.parametrize('config', [{}, FULL])
def test_monitors_change_no_bit(build, step, watch, config):
    plain = step(build(MHC, **config))
    model = build(MHC, **config)
    monitor = watch(model, alarm='warn')
    watched = step(model)
    assert torch.equal(watched[0], plain[0])
    assert all(torch.equal(watched[1][name], value) for name, value in plain[1].items())
    monitor.detach()
    assert all(connection.probe is None for connection in monitor.connections)


@pytest.mark.parametrize('config', [{}, FULL])
def test_each_forward_is_counted_once(build, step, watch, config):
    """Layer 2's MLP puts out NaN: its own streams and maps are sound, all later ones are not."""
    model = build(MHC, **config)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[0] = float('nan')
    monitor = watch(model, alarm='warn')
    for _ in range(3):
        step(model)
    metrics = reported(monitor).metrics
    counted = {kind: metrics[f'nonfinite-{kind}'].tolist() for kind in KINDS}
    after = [0, 0, 0, 0, 3, 3]
    assert counted == {'streams': after, 'maps': after, 'outputs': [0, 0, 0, 3, 3, 3]}
    assert reported(monitor).metrics['nonfinite-outputs'].sum() == 0


def test_only_the_first_microbatch_of_a_due_step_is_sampled(build, step, watch):
    model = build(MHC)
    monitor = watch(model, interval=2)
    step(model)
    assert monitor.logit_gradients._kept == [None] * 6
    assert monitor.take() == (None, None, None)
    monitor.now = 2
    step(model, seed=1)
    first, gradient = monitor._samples[0].gram, monitor.logit_gradients._kept[0]
    step(model, seed=2)
    assert monitor._samples[0].gram is first and monitor.logit_gradients._kept[0] is gradient
    monitor.now = 4
    step(model, seed=2)
    assert not torch.equal(monitor._samples[0].gram, first)


def test_evaluation_is_not_watched(build, watch):
    model = build(MHC)
    monitor = watch(model, alarm='warn')
    model.eval()
    tokens = torch.arange(8).unsqueeze(0)
    model(tokens, torch.arange(8).unsqueeze(0), None)
    assert monitor.take() == (None, None, None)


def test_a_layer_without_attention_is_no_hole_in_the_product(build, step, watch):
    """Composites go past a sublayer that does not exist."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    def spec(config):
        layers = [get_gpt_layer_local_spec() for _ in range(3)]
        layers[1].submodules.self_attention = IdentityOp
        layers[1].submodules.self_attn_bda = IdentityFuncOp
        layers[1].submodules.input_layernorm = IdentityOp
        norm = layers[0].submodules.input_layernorm
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)

    model = build(MHC, spec=spec)
    monitor = watch(model)
    step(model)
    report = reported(monitor)
    assert report.pipeline_rank.tolist() == [0, 0, -1, 0, 0, 0]
    gains = report.metrics['amax-composite-gain-forward'][report.present]
    assert torch.allclose(gains, torch.ones(5, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize(
    ('residual', 'config'),
    [({}, {}), ({}, FULL), ({'recompute_layer_num': 3}, {}), ({'sinkhorn_iterations': 3}, {})],
)
def test_logits_and_their_gradients(build, watch, backend, residual, config):
    """Summed over all tokens the gradient of a logit is that of its bias."""
    model = build(MHC | {'kernel_backend': backend} | residual, **config)
    monitor = watch(model)
    tokens = torch.arange(9).unsqueeze(0)
    positions = torch.arange(8).unsqueeze(0)
    model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean().backward()
    sample, *_ = monitor.take()
    assert sample.logits.shape == sample.logit_gradient.shape == (6, 8, 16)
    # The first one reads equal streams, of which all gradients are rounding.
    assert sample.logit_gradient[0].abs().max() < 1e-9
    for row, connection in enumerate(monitor.connections[1:], start=1):
        wanted, gradient = connection.bias.grad[8:], sample.logit_gradient[row]
        assert torch.allclose(gradient.sum(0), wanted, rtol=1e-3, atol=1e-6 * gradient.abs().max())
        assert torch.allclose(
            connection.projected(sample.logits[row]), sample.h_res[row], rtol=1e-4
        )
    assert sample.logit_gradient[1:].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize(
    'residual',
    [
        *(FIXED, STATIC, MHC | {'manifold': 'orthogonal'}, MHC | {'manifold': 'identity'}),
        MHC | {'num_residual_streams': 1},
    ],
)
def test_without_logits_nothing_is_said_of_them(build, step, watch, residual):
    from megatron_mhc.monitor.metrics import OF_LOGITS

    model = build(residual)
    monitor = watch(model)
    step(model)
    streams = residual.get('num_residual_streams', 4)
    assert not set(OF_LOGITS) & set(reported(monitor, streams).metrics)


def test_the_output_has_its_bias(build, step, watch):
    model = build(MHC)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight.zero_()
        model.decoder.layers[1].mlp.linear_fc2.bias.fill_(3)
    monitor = watch(model)
    step(model)
    sample, *_ = monitor.take()
    assert (sample.output[3] == 9).all()


def test_gradient_norms(build, watch):
    model = build(MHC)
    monitor = watch(model)
    tokens = torch.arange(9).unsqueeze(0)
    positions = torch.arange(8).unsqueeze(0)
    model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean().backward()
    monitor.after_backward()
    norms = reported(monitor).metrics['mapping-grad-norm']
    for row, connection in enumerate(monitor.connections):
        wanted = torch.stack([p.grad.norm() for p in connection.parameters()]).norm()
        assert norms[row].item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 0
