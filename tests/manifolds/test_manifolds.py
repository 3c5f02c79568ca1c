"""Every manifold: exact against an independent fp64 formula, at any logits; own ones."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mhc import ResidualConfig
from megatron_mhc.manifolds import registry
from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.sizes import INIT_PRESETS, matrix_flops
from megatron_mhc.residual.mhc import ManifoldHyperConnection

STREAMS = {
    'sinkhorn': (1, 2, 3, 4, 7, 8),
    'permutation': (1, 2, 3, 4, 5),
    'kronecker': (1, 2, 3, 4, 5, 6, 8, 12, 16),
    'orthostochastic': (1, 2, 3, 4, 8),
    'orthogonal': (1, 2, 3, 4, 7, 8),
    'diagonal': (1, 2, 3, 4, 8),
    'identity': (1, 2, 4, 8),
}
CASES = [(name, n) for name, streams in STREAMS.items() for n in streams]
# Sums of rows and columns, or H^T H, against 1. Sinkhorn's columns after 20 passes come apart.
EXACT = {torch.float32: 2e-6, torch.float64: 1e-14}


def drawn(manifold, scale=1.0, tokens=6, dtype=torch.float32):
    return scale * torch.randn(tokens, manifold.num_logits, dtype=dtype)


def mixture(logits, n):
    """Permutation by permutation, of one matrix."""
    weights = (logits - logits.max()).exp()
    weights = weights / weights.sum()
    total = torch.zeros(n, n, dtype=logits.dtype)
    for weight, image in zip(weights, itertools.permutations(range(n)), strict=True):
        for row, column in enumerate(image):
            total[row, column] += weight
    return total


def kronecker(logits, n):
    total, factors = torch.ones(1, 1, dtype=logits.dtype), []
    while n > 1:
        factors.append(next(p for p in range(2, n + 1) if n % p == 0))
        n //= factors[-1]
    for size in factors:
        count = len(list(itertools.permutations(range(size))))
        total = torch.kron(total, mixture(logits[:count], size))
        logits = logits[count:]
    return total


def rotations(logits, n):
    total = torch.eye(n, dtype=logits.dtype)
    for angle, (i, j) in zip(logits, itertools.combinations(range(n), 2), strict=True):
        turn = torch.eye(n, dtype=logits.dtype)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[j, i], turn[i, j] = math.sin(angle), -math.sin(angle)
        total = turn @ total
    return total


def squares(logits, n):
    turn, total = rotations(logits, 2 * n), torch.zeros(n, n, dtype=logits.dtype)
    for i, j in itertools.product(range(2 * n), repeat=2):
        total[i // 2, j // 2] += turn[i, j] ** 2 / 2
    return total


def scaling(logits, n):
    matrix = logits.view(n, n).exp()
    for _ in range(20):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix


TRUTH = {
    'sinkhorn': scaling,
    'permutation': mixture,
    'kronecker': kronecker,
    'orthostochastic': squares,
    'orthogonal': rotations,
    'diagonal': lambda logits, n: torch.eye(n, dtype=logits.dtype) / (1 + (-logits).exp()),
    'identity': lambda logits, n: torch.eye(n, dtype=logits.dtype),
}


def test_every_manifold_has_a_case():
    assert set(STREAMS) == set(TRUTH) == set(registry.BUILT_IN)


@pytest.mark.parametrize(('name', 'n'), CASES)
def test_matrix_is_the_formulas(name, n, random_seed):
    manifold = registry.load(name, n)
    logits = drawn(manifold, dtype=torch.float64)
    truth = torch.stack([TRUTH[name](row, n) for row in logits])
    torch.testing.assert_close(manifold.matrix(logits), truth, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        manifold.matrix(logits.float()), truth.float(), rtol=0, atol=EXACT[torch.float32]
    )


@pytest.mark.parametrize('dtype', EXACT)
@pytest.mark.parametrize(('name', 'n'), CASES)
@settings(max_examples=8, deadline=None)
@given(scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4, 1e30]), seed=st.integers(0, 2**32))
def test_the_matrix_stays_on_the_manifold(name, n, dtype, scale, seed):
    torch.manual_seed(seed)
    manifold = registry.load(name, n)
    matrix = manifold.matrix(drawn(manifold, scale, dtype=dtype))
    assert matrix.dtype == dtype and matrix.isfinite().all()
    one = torch.ones((), dtype=dtype)
    if name == 'diagonal':
        entries = matrix.diagonal(dim1=-2, dim2=-1)
        assert torch.equal(matrix, torch.diag_embed(entries))
        assert ((entries >= 0) & (entries <= 1)).all()
        return
    if not manifold.doubly_stochastic:
        square = matrix.transpose(-1, -2) @ matrix
        torch.testing.assert_close(
            square, torch.eye(n, dtype=dtype).expand_as(square), rtol=0, atol=4 * EXACT[dtype]
        )
        return
    assert (matrix >= 0).all()
    sums = [matrix.sum(-1)]
    if name != 'sinkhorn':
        sums.append(matrix.sum(-2))
        # No vector grows, so that the spectral norm is at most 1.
        vectors = torch.randn(n, 32, dtype=dtype)
        assert ((matrix @ vectors).norm(dim=-2) <= (1 + EXACT[dtype]) * vectors.norm(dim=0)).all()
    for one_sum in sums:
        torch.testing.assert_close(one_sum, one.expand_as(one_sum), rtol=0, atol=EXACT[dtype])


@pytest.mark.parametrize(('name', 'n'), [case for case in CASES if case[1] <= 4])
def test_gradients(name, n, random_seed):
    manifold = registry.load(name, n)
    logits = drawn(manifold, tokens=2, dtype=torch.float64).requires_grad_(manifold.num_logits > 0)
    if manifold.num_logits:
        assert torch.autograd.gradcheck(manifold.matrix, (logits,))


@pytest.mark.parametrize('preset', INIT_PRESETS)
@pytest.mark.parametrize(('name', 'n'), CASES)
def test_presets(name, n, preset):
    manifold = registry.load(name, n)
    bias = manifold.bias(preset)
    assert bias.shape == (manifold.num_logits,) and bias.dtype == torch.float32
    matrix = manifold.matrix(bias)
    if preset == 'uniform' and manifold.doubly_stochastic and name != 'identity':
        torch.testing.assert_close(matrix, torch.full((n, n), 1 / n))
    else:
        assert (matrix.diagonal() >= 0.95).all()


@pytest.mark.parametrize(('name', 'n'), CASES)
def test_a_sublayer_reads_and_writes_by_the_equations(name, n, random_seed):
    """Maps from phi, b and alpha in fp64; gradients reach every parameter."""
    hidden, tokens = 8, 5
    residual = ResidualConfig(num_residual_streams=n, manifold=name)
    module = ManifoldHyperConnection(hidden, residual, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(tokens, n * hidden, requires_grad=True)
    y = torch.randn(tokens, hidden)
    streams, u, carried = module(x)
    out = module.post(y, carried)

    size = registry.num_logits(name, n)
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    v = x.detach().double()
    logits = (v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ parameters[
        'mapping_proj.weight'
    ].T
    alpha = [parameters['alpha_pre'], parameters['alpha_post'], parameters.get('alpha_res')]
    sizes = [n, n, size]
    parts = [
        part if factor is None else factor * part + b
        for factor, part, b in zip(
            alpha, logits.split(sizes, -1), parameters['bias'].split(sizes), strict=True
        )
    ]
    h_res = torch.stack([TRUTH[name](row, n) for row in parts[2]])
    v = v.view(tokens, n, hidden)
    expected_u = torch.einsum('tn,tnc->tc', parts[0].sigmoid(), v)
    write = torch.einsum('tn,tc->tnc', 2 * parts[1].sigmoid(), y.double())
    expected = torch.einsum('tij,tjc->tic', h_res, v) + write
    torch.testing.assert_close(u.double(), expected_u, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double().view(tokens, n, hidden), expected, rtol=1e-4, atol=1e-4)
    (u.sum() + (out * torch.randn_like(out)).sum()).backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0 or n == 1, key


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'manifold': 'permutation', 'num_residual_streams': 6}, '720 permutations of 6 streams'),
        ({'manifold': 'kronecker', 'num_residual_streams': 14}, 'a factor of 7'),
        ({'manifold': 'birkhoff'}, 'choose one of sinkhorn, permutation'),
        ({'manifold': 'identity', 'sinkhorn_iterations': 5}, 'has no effect with manifold'),
        ({'manifold': 'identity', 'edge_fusion': False}, 'has no effect with manifold'),
        ({'manifold': 'orthogonal', 'fixed_mappings': ('res',)}, '--mhc-fixed-mappings res'),
        ({'manifold': 'identity', 'residual_type': 'hc'}, 'has no effect with residual_type'),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(ValueError, match=message):
        ResidualConfig(**flags)


def test_flag_is_resolved_and_compared(parse, refused):
    args = parse('--residual-type', 'mhc', '--mhc-manifold', 'permutation')
    assert args.mhc_manifold == 'permutation'
    assert parse('--residual-type', 'mhc').mhc_manifold == 'sinkhorn'
    assert '--mhc-manifold' in refused('--residual-type hc --mhc-manifold identity')
    from megatron_mhc.settings.flags_residual import same_structure

    assert not same_structure(ResidualConfig(), ResidualConfig(manifold='permutation'))


@pytest.mark.parametrize('n', [2, 4, 5])
def test_operations_are_counted(n):
    assert matrix_flops('sinkhorn', n, 20) == 80 * n * n
    count = functools.reduce(lambda a, b: a * b, range(1, n + 1))
    assert matrix_flops('permutation', n, 20) == count * (3 + 2 * n * n)
    assert matrix_flops('orthogonal', n, 20) == 3 * n * n * (n - 1)
    assert matrix_flops('identity', n, 20) == 0


class Mean(Manifold):
    """An own manifold: a learned mixture of I and 1/n."""

    num_logits = 1

    def matrix(self, logits):
        a = logits.sigmoid().unsqueeze(-1)
        return a * torch.eye(self.n) + (1 - a) / self.n

    def bias(self, preset):
        return torch.full((1,), 6.0 if preset == 'identity' else -30.0)


class WrongShape(Mean):
    def matrix(self, logits):
        return super().matrix(logits)[..., 0]


class NotANumber(Mean):
    def matrix(self, logits):
        return super().matrix(logits) / 0 * 0


class Constant(Mean):
    def matrix(self, logits):
        return super().matrix(logits.detach())


class Halved(Mean):
    def matrix(self, logits):
        return super().matrix(logits) / 2


class ShortBias(Mean):
    def bias(self, preset):
        return torch.zeros(2)


class OnlyThree(Mean):
    def __init__(self, n):
        if n != 3:
            raise ValueError(f'{n} streams: only 3 will do')
        super().__init__(n)


@pytest.fixture
def offer(monkeypatch):
    """``offer(name, attribute)``: an installed package declares this entry point."""

    def declare(name, attribute):
        point = importlib.metadata.EntryPoint(name, f'{__name__}:{attribute}', registry.GROUP)
        monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
        monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: [point])

    def forget():
        registry.offered.cache_clear()
        registry.load.cache_clear()

    forget()
    yield declare
    forget()


def test_a_manifold_of_another_package(offer, random_seed):
    offer('mean', 'Mean')
    module = ManifoldHyperConnection(8, ResidualConfig(manifold='mean', init='uniform'), 0)
    assert module.mapping_proj.weight.shape == (2 * 4 + 1, 32)
    x = torch.randn(3, 32)
    _, _, h_res = module.all_maps(x)
    torch.testing.assert_close(h_res, torch.full((3, 4, 4), 0.25))


@pytest.mark.parametrize(
    ('attribute', 'message'),
    [
        ('WrongShape', 'wanted [2, 3, 4, 4]'),
        ('NotANumber', 'not finite'),
        ('Constant', 'cannot be differentiated'),
        ('Halved', 'do not sum to 1'),
        ('ShortBias', 'wanted 1 finite values'),
        ('OnlyThree', 'only 3 will do'),
        ('Absent', 'AttributeError'),
        ('drawn', 'AttributeError'),
    ],
)
def test_one_that_does_not_keep_its_word(attribute, message, offer):
    offer('mine', attribute)
    with pytest.raises(ValueError) as refused:
        ResidualConfig(manifold='mine')
    text = str(refused.value)
    assert message in text and '--mhc-manifold mine' in text and '\n' not in text


def test_a_name_that_is_taken(offer):
    offer('identity', 'Mean')
    with pytest.raises(ValueError, match='the name is taken by megatron-mhc'):
        ResidualConfig(manifold='identity')


@pytest.mark.parametrize(
    ('name', 'preset', 'largest', 'smallest'),
    [
        ('sinkhorn', 'identity', 9.8e-3, 2.5e-3),
        ('sinkhorn', 'uniform', 0.25, 0.25),
        ('permutation', 'identity', 1.4e-2, 9.4e-4),
        ('permutation', 'uniform', 0.12, 0.12),
        ('orthostochastic', 'identity', 0.39, 3.3e-3),
        ('orthostochastic', 'uniform', 1.3, 0.0),
    ],
)
def test_how_far_logits_move_the_matrix_at_the_start(name, preset, largest, smallest):
    """The figures of the page."""
    manifold = registry.load(name, 4)
    bias = manifold.bias(preset).double()
    slope = torch.autograd.functional.jacobian(lambda x: manifold.matrix(x).flatten(), bias)
    values = torch.linalg.svdvals(slope)[:9]
    assert values[0].item() == pytest.approx(largest, rel=0.05)
    assert values[8].item() == pytest.approx(smallest, rel=0.05, abs=1e-6)


def test_sizes_need_no_torch():
    code = (
        'import sys; sys.modules["torch"] = None\n'
        'from megatron_mhc.manifolds.registry import BUILT_IN, num_logits\n'
        'print(*(num_logits(name, 4) for name in BUILT_IN))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['16', '24', '4', '28', '6', '4', '0']


def test_table_of_the_guide_can_be_made():
    """Sums and gradients as the tool measures them, with fewer matrices."""
    command = [sys.executable, 'tools/manifold_table.py', '--matrices', '200', '--seed', '7']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed.splitlines()]
    measured = {row[0]: row[1:] for row in rows[2:]}
    assert list(measured) == list(STREAMS)
    for name, (logits, *sums, least, norm, gradient) in measured.items():
        assert int(logits) == registry.num_logits(name, 4)
        assert float(norm) < 1e-6
        assert name == 'identity' or float(gradient) < 1e-6
        assert name == 'orthogonal' or float(least) >= 0
        if name not in ('orthogonal', 'diagonal'):
            assert max(map(float, sums)) < (0.1 if name == 'sinkhorn' else 1e-6)
