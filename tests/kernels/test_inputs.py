"""What the kernels refuse by name, and what ``auto`` takes and says."""

import inspect
import logging

import pytest
import torch

from megatron_mhc import ops
from megatron_mhc.kernels import backend

N, T, C = 4, 6, 8
TRITON = {'backend': 'triton'}


def inputs(device) -> dict[str, torch.Tensor]:
    return {
        'x': torch.randn(T, N * C, device=device),
        'y': torch.randn(T, C, device=device),
        'h_pre': torch.rand(T, N, device=device),
        'h_post': torch.rand(T, N, device=device),
        'h_res': torch.rand(T, N, N, device=device),
        'weight': torch.randn(24, N * C, device=device),
        'bias': torch.randn(24, device=device),
        'alpha': torch.randn(3, device=device),
        'y_bias': torch.randn(C, device=device),
        'seed': torch.zeros(1, dtype=torch.int64, device=device),
    }


CALLS = {
    'mapping': lambda x, weight, bias, alpha, **o: ops.mapping(
        x, weight, bias, alpha, **{'num_streams': N, **TRITON, **o}
    ),
    'read': lambda x, weight, bias, alpha, **o: ops.read(
        x, weight, bias, alpha, **{'num_streams': N, **TRITON, **o}
    ),
    'pre': lambda x, h_pre, **o: ops.pre(x, h_pre, **{**TRITON, **o}),
    'post_res': lambda x, y, h_post, h_res, y_bias, **o: ops.post_res(
        x, y, h_post, h_res, y_bias, **{**TRITON, **o}
    ),
    'sinkhorn': lambda h_res, iterations=20, **o: ops.sinkhorn(
        h_res, iterations, **{**TRITON, **o}
    ),
}


def write_read(x, y, weight, bias, alpha, y_bias, **options):
    first = {'num_streams': N, **TRITON}
    whole = torch.ones(24, x.shape[-1], device=x.device)
    _, carried = ops.read(x, whole, bias, alpha, **first)
    return ops.write_read(y, carried, weight, bias, alpha, **first | options, y_bias=y_bias)


def write(x, y, weight, bias, alpha, y_bias, **options):
    _, carried = ops.read(x, weight, bias, alpha, num_streams=N, **TRITON)
    return ops.write(y, carried, y_bias, **options)


CALLS |= {'write_read': write_read, 'write': write}


def parameters_of(op) -> list[str]:
    return [name for name in inspect.signature(CALLS[op]).parameters if name in inputs('cpu')]


# op, what replaces an argument, the beginning of the message.
REFUSED = [
    ('mapping', {'x': lambda t: t.double()}, "backend: got 'triton'.*float64"),
    ('pre', {'x': lambda t: t.double()}, "backend: got 'triton'.*float64"),
    ('sinkhorn', {'h_res': lambda t: t.double()}, "backend: got 'triton'.*float64"),
    ('sinkhorn', {'h_res': lambda t: t[:, :3, :3]}, "backend: got 'triton'.*not 3"),
    (
        'pre',
        {'x': lambda t: t[:, :24], 'h_pre': lambda t: t[:, :3]},
        "backend: got 'triton'.*not 3",
    ),
    *((op, {'backend': 'cudnn'}, "backend: got 'cudnn'") for op in ('mapping', 'pre', 'sinkhorn')),
    ('mapping', {'precision': 'fp8'}, "precision: got 'fp8'"),
    ('read', {'precision': 'bf16'}, "precision: got 'bf16'"),
    ('read', {'precision': 'bf16x2'}, "precision: got 'bf16x2' for torch.float32"),
    ('write_read', {'precision': 'bf16x2'}, "precision: got 'bf16x2' for torch.float32"),
    ('write_read', {'sinkhorn_iterations': 0}, 'sinkhorn_iterations: got 0'),
    ('mapping', {'norm_eps': -1.0}, 'norm_eps: got -1.0'),
    ('mapping', {'num_streams': 3}, 'x: got shape'),
    ('mapping', {'weight': lambda t: t[:23]}, 'weight: got shape'),
    ('read', {'bias': lambda t: t[:23]}, 'bias: got shape'),
    ('read', {'alpha': lambda t: t[:2]}, 'alpha: got shape'),
    ('read', {'weight': lambda t: t.long()}, 'weight: got torch.int64'),
    ('read', {'x': lambda t: t.int()}, 'x: got torch.int32'),
    ('sinkhorn', {'iterations': 0}, 'iterations: got 0'),
    ('read', {'x': lambda t: t.to('meta')}, 'weight: got device'),
    ('read', {'weight': lambda t: t.to('meta')}, 'weight: got device meta'),
    ('pre', {'h_pre': lambda t: t.to('meta')}, 'h_pre: got device meta'),
    ('post_res', {'y': lambda t: t.to('meta')}, 'y: got device meta'),
    ('write_read', {'y_bias': lambda t: t.to('meta')}, 'bias: got device meta'),
    ('write_read', {'weight': lambda t: t[:20]}, 'weight: got shape'),
    ('post_res', {'h_res': lambda t: t[:, :3]}, 'h_res: got shape'),
    ('post_res', {'h_post': lambda t: t[:5]}, 'h_post: got shape'),
    ('post_res', {'y_bias': lambda t: t[:5]}, 'bias: got shape'),
    ('write', {'y': lambda t: t[:, :5]}, 'y: got shape'),
    ('write', {'y': lambda t: t.long()}, 'y: got torch.int64'),
    *((op, {'dropout': 1.0}, 'dropout: got 1.0') for op in ('post_res', 'write', 'write_read')),
    *((op, {'dropout': -0.1}, 'dropout: got -0.1') for op in ('post_res', 'write', 'write_read')),
    *(
        (op, {'dropout': 0.5, 'seed': seed}, 'seed: got')
        for op in ('post_res', 'write', 'write_read')
        for seed in (torch.zeros(1), torch.zeros((), dtype=torch.int64))
    ),
]


@pytest.mark.parametrize(('op', 'changes', 'message'), REFUSED)
def test_wrong_input_is_named(op, changes, message, device):
    tensors = inputs(device)
    arguments = {name: tensors[name] for name in parameters_of(op)}
    for name, change in changes.items():
        arguments[name] = change(tensors[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        CALLS[op](**arguments)


@pytest.mark.parametrize('op', CALLS)
def test_the_table_s_inputs_are_right_otherwise(op, device):
    tensors = inputs(device)
    CALLS[op](**{name: tensors[name] for name in parameters_of(op)})


@pytest.fixture
def said(caplog):
    """The log of the kernels, as if no op had run before in this process."""
    backend._log_once.cache_clear()
    caplog.set_level(logging.INFO, 'megatron_mhc.kernels')
    yield caplog
    backend._log_once.cache_clear()


def test_auto_on_the_cpu_is_torch_and_says_so_once(said):
    tensors = inputs('cpu')
    for _ in range(3):
        u = ops.pre(tensors['x'], tensors['h_pre'])
        ops.post_res(*(tensors[name] for name in ('x', 'y', 'h_post', 'h_res')))
        mapped = (tensors[name] for name in ('x', 'weight', 'bias', 'alpha'))
        _, carried = ops.read(*mapped, num_streams=N)
    assert torch.equal(u, ops.pre(tensors['x'], tensors['h_pre'], backend='torch'))
    assert not carried.fused
    lines = [(record.levelname, record.getMessage()) for record in said.records]
    reason = 'torch reference, because the streams are on the CPU'
    assert lines == [('INFO', f'{op}: {reason}') for op in ('pre', 'post_res', 'read')]


def test_auto_with_three_streams_is_torch(said, device):
    x, h_pre = torch.randn(5, 12, device=device), torch.rand(5, 3, device=device)
    for _ in range(2):
        assert torch.equal(ops.pre(x, h_pre), ops.pre(x, h_pre, backend='torch'))
    (record,) = said.records
    # On a GPU the reference is a loss; on the CPU it is what everyone gets.
    assert record.levelname == ('INFO' if device.type == 'cpu' else 'WARNING')
    assert record.getMessage().startswith('pre: torch reference, because')


def test_asking_for_torch_says_nothing(said):
    ops.pre(torch.randn(5, 8), torch.rand(5, 2), backend='torch')
    assert not said.records


def test_carried_of_another_number_of_streams_is_refused(device):
    x, y = torch.randn(6, 32, device=device), torch.randn(6, 16, device=device)
    two = [torch.randn(8, 32, device=device), torch.zeros(8, device=device)]
    four = [torch.randn(24, 32, device=device), torch.zeros(24, device=device)]
    alpha = torch.ones(3, device=device)
    _, carried = ops.read(x, *two, alpha, num_streams=2, backend='triton')
    with pytest.raises(ValueError, match='num_streams: got 4, wanted 2'):
        ops.write_read(y, carried, *four, alpha, num_streams=4, backend='triton')
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        ops.write(y, carried, backend='cuda')
    with pytest.raises(ValueError, match='y_bias: got shape'):
        ops.write_read(y, carried, *two, alpha, num_streams=2, y_bias=torch.zeros(3, device=device))
