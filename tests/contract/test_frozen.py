"""Frozen parameters: those that train get the gradients, bit for bit, that they get beside them."""

from __future__ import annotations

import pytest
import torch
from block_models import assert_equal, plain_step

STREAMS = 2
MHC = {'residual_type': 'mhc', 'kernel_backend': 'torch', 'init': 'identity'}
# Streams as by default, where they have no effect.
ATTENTION = {
    'residual_type': 'attention',
    'attention_block_size': 3,
    'num_residual_streams': 4,
}
GATED = {'residual_type': 'gated', 'gated_rank': 3}
FULL = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 1}
SELECTIVE = {'recompute_granularity': 'selective', 'recompute_modules': ['layernorm', 'core_attn']}
MODELS = {
    'standard': (None, {}),
    'hc': ({'residual_type': 'hc'}, {}),
    'mhc': (MHC, {}),
    'kernels': ({'kernel_backend': 'triton'}, {}),
    'single-pass': (MHC | {'single_pass': True}, {}),
    'learned-merge': (MHC | {'stream_merge': 'learned'}, {}),
    'one-segment': (MHC | {'recompute_layer_num': 3}, {}),
    'segments': (MHC | {'recompute_layer_num': 1}, {}),
    'selective': (MHC, SELECTIVE),
    'full': (MHC, FULL),
    'single-pass-full': (MHC | {'single_pass': True}, FULL),
    'gated': (GATED, {'normalization': 'RMSNorm'}),
    'attention': (ATTENTION, {}),
    'attention-full': (ATTENTION, FULL),
    'mudd': ({'residual_type': 'mudd', 'num_residual_streams': 4}, {}),
}
OURS = ('hyper_connection', 'stream_merge', 'dense_aggregate')
TRAINED = {
    'maps': lambda name: any(ours in name for ours in OURS),
    'base': lambda name: not any(ours in name for ours in OURS),
    'last-layer': lambda name: '.layers.2.' in name,
    'one-weight': lambda name: name.endswith('layers.1.mlp.linear_fc1.weight'),
}


@pytest.mark.parametrize('trained', TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize(('residual', 'settings'), MODELS.values(), ids=MODELS)
def test_what_trains_gets_its_gradient(build, residual, settings, trained, random_seed):
    model = build(residual, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(ours in name for ours in OURS):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    names = {n for n, _ in model.named_parameters() if trained(n)}
    if not names:
        return
    expected = plain_step(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    assert_equal(plain_step(model), {n: expected[n] for n in ('loss', *sorted(names))})


class Adapted(torch.nn.Module):
    """A linear layer of Megatron's with a low-rank adapter beside it (LoRA), which starts at 0."""

    def __init__(self, linear, rank=3):
        super().__init__()
        out, width = linear.weight.shape
        self.linear = linear
        self.down = torch.nn.Parameter(torch.randn(rank, width))
        self.up = torch.nn.Parameter(torch.zeros(out, rank))

    def forward(self, x, *args, **kwargs):
        y, bias = self.linear(x, *args, **kwargs)
        return y + x @ self.down.t() @ self.up.t(), bias


@pytest.mark.parametrize('name', ['hc', 'mhc', 'single-pass', 'segments', 'full'])
def test_adapters_of_a_frozen_model_learn(build, name, random_seed):
    """With W + up down, the gradient of ``up`` is that of W, taken along ``down``."""
    residual, settings = MODELS[name]
    model = build(residual, **settings)
    dense = plain_step(model)
    model.requires_grad_(False)
    adapted = {}
    for number, layer in enumerate(model.decoder.layers):
        for path in ('self_attention.linear_qkv', 'self_attention.linear_proj', 'mlp.linear_fc1'):
            owner = layer.get_submodule(path.partition('.')[0])
            attribute = path.partition('.')[2]
            adapter = Adapted(getattr(owner, attribute))
            setattr(owner, attribute, adapter)
            adapted[f'decoder.layers.{number}.{path}'] = adapter
    got = plain_step(model)
    assert torch.equal(got.pop('loss'), dense['loss'])
    assert got.keys() == {f'{path}.{end}' for path in adapted for end in ('down', 'up')}
    for path, adapter in adapted.items():
        expected = dense[f'{path}.weight'] @ adapter.down.t()
        torch.testing.assert_close(got[f'{path}.up'], expected, rtol=1e-4, atol=1e-6, msg=path)
        assert not got[f'{path}.down'].any()
