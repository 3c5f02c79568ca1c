"""I then W leave the bits of a plain backward in every gradient, whatever the module."""

import random
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from megatron_mhc.schedules.executor_module import ModuleStage
from megatron_mhc.schedules.executor_split import _computes_all, backward_input

HIDDEN, MICROBATCHES = 8, 3


class Scale(torch.autograd.Function):
    runs = 0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.variable = 'of the user'
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        Scale.runs += 1
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).flatten(0, -2).sum(0)


@torch.library.custom_op('test_split::scale', mutates_args=())
def scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


def _scale_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).flatten(0, -2).sum(0)


scale.register_autograd(
    _scale_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Block(nn.Module):
    """Attention and MLP with residuals."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 16), nn.GELU(), nn.Linear(16, HIDDEN))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Custom(nn.Module):
    """A weight of an autograd function, and of a custom operator, between linear layers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN))
        self.other = nn.Parameter(torch.randn(HIDDEN))
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        x = Scale.apply(self.first(x), self.weight.tanh())
        return self.second(scale(x, self.other))


class Shared(nn.Module):
    """One weight three times, once off the path of the input, and once more through a view."""

    def __init__(self):
        super().__init__()
        self.linear, self.once = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        x = self.linear(self.once(self.linear(x)).sin())
        return x * self.linear.weight.sum(0) + self.linear.weight[0] * x


class OffPath(nn.Module):
    """Weights whose operations the input does not reach, frozen and unused ones."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, HIDDEN))
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, HIDDEN))
        self.frozen = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.unused = nn.Linear(HIDDEN, HIDDEN)
        self.buffer = nn.Parameter(torch.randn(HIDDEN))
        self.other = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x):
        # Twice in one operation, and behind functions of its own.
        squared = torch.mul(self.buffer, self.buffer) * Scale.apply(self.other[None], self.other)
        return self.frozen(self.linear(x)) + self.frozen(self.position) * squared


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3)
        )

    def forward(self, x):
        return self.layers(x)


class Random(nn.Module):
    """A random graph: linear layers, element-wise operations and autograd functions, shared."""

    def __init__(self, choose: random.Random):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.scales = nn.ParameterList(torch.randn(HIDDEN) for _ in range(4))
        self.steps = [
            (choose.randrange(5), choose.randrange(4), choose.random(), choose.random())
            for _ in range(12)
        ]

    def forward(self, x):
        values = [x, self.scales[0] * 1]
        for kind, which, left, right in self.steps:
            a = values[int(left * len(values))]
            b = values[int(right * len(values))]
            values.append(self.step(kind, self.linears[which], self.scales[which], a, b))
        return sum(value.tanh() for value in values[2:]) + x

    @staticmethod
    def step(kind, linear, weight, a, b):
        match kind:
            case 0:
                return linear(a)
            case 1:
                return a * weight
            case 2:
                return a.tanh() + b
            case 3:
                return Scale.apply(a.expand(2, 4, HIDDEN), weight)
            case 4:
                return functional.layer_norm(a, (HIDDEN,), weight) * b


MODULES = {
    'block': Block,
    'custom': Custom,
    'shared': Shared,
    'off-path': OffPath,
    'checkpointed': Checkpointed,
    'convolution': Convolution,
    'two-blocks': lambda: nn.Sequential(Block(), Block()),
}


def microbatches():
    x = torch.randn(MICROBATCHES, 2, 4, HIDDEN)
    return list(x)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def plain(module, inputs, grads):
    module.zero_grad()
    found = []
    for x, grad in zip(inputs, grads, strict=True):
        x = x.clone().requires_grad_()
        module(x).backward(grad)
        found.append(x.grad)
    return found, gradients(module)


def split(module, inputs, grads):
    """I0 I1 W0 I2 W1 W2, all forward passes first."""
    module.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = [module(x) for x in inputs]
    found, pending = [], []
    for microbatch, (x, output, grad) in enumerate(zip(inputs, outputs, grads, strict=True)):
        gradient, weights = backward_input(output, grad, x)
        found.append(gradient)
        pending.append(weights)
        if microbatch:
            pending.pop(0).weight()
    pending.pop().weight()
    return found, gradients(module)


def assert_same(module):
    inputs = microbatches()
    with torch.no_grad():
        grads = [torch.randn_like(module(x)) for x in inputs]
    expected_inputs, expected = plain(module, inputs, grads)
    found_inputs, found = split(module, inputs, grads)
    for a, b in zip(expected_inputs, found_inputs, strict=True):
        assert torch.equal(a, b)
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name


@pytest.mark.parametrize('name', MODULES)
def test_split_backward_equals_plain(name, random_seed):
    assert_same(MODULES[name]())


def test_split_backward_of_random_graphs_equals_plain(random_seed):
    for _ in range(20):
        assert_same(Random(random.Random(torch.randint(2**31, ()).item())))


def test_input_gradient_leaves_weights_for_later_and_nothing_runs_twice(random_seed):
    module = nn.Sequential(Block(), Block())
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        counts = counter.get_flop_counts()['Global']
        return result, sum(n for op, n in counts.items() if 'attention' not in str(op))

    _, whole = flops(lambda: module(x).sum().backward())
    _, forward = flops(lambda: module(x))
    module.zero_grad()
    x.grad = None
    output = module(x).sum()
    (_, pending), inputs = flops(lambda: backward_input(output, None, x))
    assert all(gradient is None for gradient in gradients(module).values())
    _, weights = flops(pending.weight)
    assert inputs + weights == whole - forward and inputs == weights > 0


def test_autograd_functions_run_once(random_seed):
    module = Custom()
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)
    output = module(x).sum()
    Scale.runs = 0
    _, pending = backward_input(output, None, x)
    assert module.weight.grad is not None and module.other.grad is not None
    assert module.first.weight.grad is None and module.second.bias.grad is None
    pending.weight()
    assert Scale.runs == 1 and module.first.weight.grad is not None


def test_autograd_functions_of_extensions_run_once():
    class Node:
        def name(self):
            return 'torch::autograd::CppNode<Scale>'

    assert _computes_all(Node())


def test_hooks_on_weights_run_once(random_seed):
    module = Shared()
    seen = []
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.append(name) or grad * 2)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)
    _, pending = backward_input(module(x).sum(), None, x)
    pending.weight()
    assert sorted(seen) == sorted(2 * [name for name, _ in module.named_parameters()])
    assert_same(module)


def test_without_input_gradient_everything_is_weights(random_seed):
    module = nn.Embedding(10, HIDDEN)
    for x in (torch.arange(4), None):
        module.zero_grad()
        gradient, pending = backward_input(module(torch.arange(4)).sum(), None, x)
        assert gradient is None and module.weight.grad is None
        pending.weight()
        assert module.weight.grad is not None
    # An input that the output does not depend on.
    gradient, pending = backward_input(
        module(torch.arange(4)).sum(), None, torch.zeros(2, requires_grad=True)
    )
    module.zero_grad()
    pending.weight()
    assert gradient is None and module.weight.grad is not None


def test_nothing_is_kept_afterwards(random_seed):
    module = Custom()
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)
    kept = weakref.ref(x)
    gradient, pending = backward_input(module(x).sum(), None, x)
    assert x.grad is None and gradient.shape == x.shape
    del x
    assert kept() is not None  # the first layer's weight gradient needs it
    pending.weight()
    assert kept() is None


def test_second_backward_is_refused(random_seed):
    stage = ModuleStage(Block())
    stage.forward(0, torch.randn(2, 4, HIDDEN))
    grad = torch.ones(2, 4, HIDDEN)
    assert stage.backward_input(0, grad).shape == grad.shape
    with pytest.raises(RuntimeError, match='microbatch 0 has no forward to go back through'):
        stage.backward_input(0, grad)
    with pytest.raises(RuntimeError, match='microbatch 0 has no forward to go back through'):
        stage.backward(0, grad)
    pending = stage._weights[0]
    stage.backward_weight(0)
    with pytest.raises(RuntimeError, match='no weight gradients of microbatch 0'):
        stage.backward_weight(0)
    with pytest.raises(RuntimeError, match='computed already'):
        pending.weight()


def test_wrong_inputs_are_refused(random_seed):
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)
    with pytest.raises(ValueError, match='begins a new graph'):
        backward_input(Block()(x * 2).sum(), None, x * 2)
    output = checkpoint(Block(), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match='use_reentrant=False'):
        backward_input(output.sum(), None, x)


def test_recomputing_stage_repeats_its_random_numbers(random_seed):
    module = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, HIDDEN))
    results = []
    for recomputing in (False, True):
        torch.manual_seed(random_seed)
        module.zero_grad()
        stage = ModuleStage(module, recomputing=recomputing)
        output = stage.forward(0, torch.ones(2, HIDDEN))
        after = torch.rand(3)
        if recomputing:
            state = torch.get_rng_state()
            stage.recompute(0)
            assert torch.equal(torch.get_rng_state(), state)
        results.append(
            (output, after, stage.backward(0, torch.ones(2, HIDDEN)), module[0].weight.grad)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
