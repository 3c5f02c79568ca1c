"""What a CUDA graph of n-stream layers asks of us, as far as it can be seen without a GPU.

In place of the graph stands the list of the torch operations of one step: like a graph, it runs
again in the same memory, on what the inputs then hold, without any Python of ours or of Megatron.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.settings.constraint import graphs_of_layers

SEQUENCE, BATCH, STREAMS = 8, 2, 3
AS_LARGE = {'num_residual_streams': STREAMS, 'kernel_backend': 'torch'}
RESIDUALS = [
    {'residual_type': 'mhc', **AS_LARGE},
    {'residual_type': 'hc', **AS_LARGE},
    {'residual_type': 'mhc', 'manifold': 'kronecker', 'num_residual_streams': 4},
]


def inputs_of(layer, seed):
    """Hidden states, the mask, and the gradient of the result."""
    static = layer.get_layer_static_inputs(SEQUENCE, BATCH)
    generator = torch.Generator().manual_seed(seed)
    shape = static['hidden_states'].shape
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, static['attention_mask'], g


def step_of(layer):
    """Forward and backward of one layer -> its streams, and the gradients of all it uses."""
    parameters = list(layer.parameters())

    def step(x, mask, g):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = layer(x, attention_mask=mask)[0]
            return out.detach(), *torch.autograd.grad(out, [x, *parameters], g)

    return step


class Graph(TorchDispatchMode):
    """``Graph(step, inputs)`` captures, after one step to warm up, as Megatron does.

    ``replay(inputs)`` copies them to where the first ones were. Raises where the host would look at
    a value, which ends a capture.
    """

    looks = ('_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero', 'masked_select', 'unique')

    def __init__(self, step, inputs):
        super().__init__()
        self.calls = []
        self.inputs = [tensor.clone() for tensor in inputs]
        step(*self.inputs)
        with self:
            self.outputs = step(*self.inputs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function.overloadpacket.__name__ not in self.looks
        # Aliases: Megatron exchanges the data of tensors, and memory is what a graph knows.
        given = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        made = function(*args, **kwargs)
        self.calls.append((function, given, tree_map_only(torch.Tensor, torch.Tensor.detach, made)))
        return made

    @torch.no_grad()
    def replay(self, inputs):
        for old, new in zip(self.inputs, inputs, strict=True):
            old.copy_(new)
        for function, (args, kwargs), made in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return tuple(tensor.clone() for tensor in self.outputs)


@pytest.fixture(autouse=True)
def no_state_on_the_host(monkeypatch, megatron):
    """Megatron compares the state of the CPU generator around attention's dropout."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = type(get_cuda_rng_tracker())
    monkeypatch.setattr(tracker, 'fork', lambda *_args, **_kwargs: contextlib.nullcontext())


@pytest.mark.parametrize('residual', RESIDUALS, ids=str)
def test_a_layer_replays_without_its_python(build, residual, random_seed):
    layer = build(residual, num_layers=2).decoder.layers[0]
    step = step_of(layer)
    graph = Graph(step, inputs_of(layer, 0))
    for seed in (random_seed, random_seed + 1):
        given = inputs_of(layer, seed)
        for got, want in zip(graph.replay(given), step(*given), strict=True):
            assert torch.equal(got, want)


def test_each_replay_draws_its_own_dropout(build):
    """From the device's generator, whose state a graph advances; the seed is no number in it."""
    layer = build(RESIDUALS[0], num_layers=1, hidden_dropout=0.5).decoder.layers[0]
    given, step = inputs_of(layer, 1), step_of(layer)
    graph = Graph(step, given)
    torch.manual_seed(11)
    first, second = graph.replay(given), graph.replay(given)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(11)
    for got, want in zip(first, step(*given), strict=True):
        assert torch.equal(got, want)


def test_transformer_engine_captures_both_sublayers(build):
    """Megatron calls them by hand where Transformer Engine makes the graph of a layer."""
    layer = build(RESIDUALS[0], num_layers=1).decoder.layers[0]
    x, mask, _ = inputs_of(layer, 3)
    (captured,) = layer._te_cuda_graph_capture(x, attention_mask=mask)
    assert torch.equal(captured, layer(x, attention_mask=mask)[0])


def test_static_inputs_have_all_streams(build):
    """As ``make_graphed_callables`` of Transformer Engine gets them, in bf16."""
    block = build(RESIDUALS[0], num_layers=1).decoder
    hidden = block.layers[0].get_layer_static_inputs(SEQUENCE, BATCH)['hidden_states']
    assert hidden.shape == (SEQUENCE, BATCH, STREAMS * block.config.hidden_size)
    assert hidden.is_leaf and hidden.requires_grad and hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('settings', 'chained'),
    [
        ({'cuda_graph_impl': 'none'}, True),
        ({'cuda_graph_impl': 'local'}, False),
        ({'cuda_graph_impl': 'transformer_engine'}, False),
        ({'enable_cuda_graph': True}, False),
        ({'cuda_graph_impl': 'full_iteration'}, True),
        ({'cuda_graph_impl': 'local', 'cuda_graph_scope': ['full_iteration']}, True),
    ],
    ids=str,
)
def test_a_captured_layer_reads_nothing_ahead(build, settings, chained):
    """Its successor would start from a buffer, without what was read."""
    layers = build(RESIDUALS[0], num_layers=2).decoder.layers
    config, layers[0].following = layers[0].config, ()
    before = {name: getattr(config, name, None) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    layers[0].precedes(layers[1])
    for name, value in before.items():
        setattr(config, name, value)
    assert graphs_of_layers(settings.get) is not chained
    assert bool(layers[0].following) is chained


def test_parameters_of_captured_sublayers_are_gathered(build):
    """Megatron runs the hooks of the modules that it lists, and only those, before a replay."""
    from megatron.core.transformer import transformer_layer

    layer = build(RESIDUALS[0], num_layers=1).decoder.layers[0]

    def connections():
        listed = layer._get_submodules_under_cudagraphs()
        inside = [module for whole in listed for module in whole.modules()]
        return {module for module in inside if isinstance(module, HyperConnection)}

    both = {layer.self_attention_hyper_connection, layer.mlp_hyper_connection}
    assert connections() == both
    # Core 0.17 calls them scopes.
    attention = next(
        getattr(transformer_layer, name).attn
        for name in ('CudaGraphModule', 'CudaGraphScope')
        if hasattr(transformer_layer, name)
    )
    modules = hasattr(transformer_layer, 'CudaGraphModule')
    name = 'cuda_graph_modules' if modules else 'cuda_graph_scope'
    before = getattr(layer.config, name)
    setattr(layer.config, name, [attention])
    inside = connections()
    setattr(layer.config, name, before)
    assert inside == {layer.self_attention_hyper_connection}
