"""The op contract against the paper's equations in fp64, golden vectors, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mhc import ops

# Largest absolute error of a map against fp64, per input dtype (maps are O(1)).
MAP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}
# Streams: relative to the largest element; one rounding of the output dtype.
STREAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}

STREAM_COUNTS = [1, 2, 3, 4, 8]


def sinkhorn_by_hand(logits, iterations):
    """Eq 9 in Python floats, one element at a time."""
    m = [[math.exp(v) for v in row] for row in logits]
    n = len(m)
    for _ in range(iterations):
        sums = [sum(m[i][j] for i in range(n)) for j in range(n)]
        m = [[m[i][j] / sums[j] for j in range(n)] for i in range(n)]
        m = [[v / sum(row) for v in row] for row in m]
    return torch.tensor(m, dtype=torch.float64)


def golden_logits(scale, dtype=torch.float64):
    return torch.tensor(
        [[scale * math.sin(1 + 4 * i + j) for j in range(4)] for i in range(4)], dtype=dtype
    )


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_sinkhorn_golden_vectors(dtype):
    tolerance = 5e-9 if dtype is torch.float64 else 3e-7
    first = torch.tensor(
        [
            [0.31597718, 0.45564607, 0.19318564, 0.03519110],
            [0.00493125, 0.02416736, 0.30985279, 0.66104860],
            [0.57418379, 0.10681131, 0.08455614, 0.23444876],
            [0.10490778, 0.41337526, 0.41240542, 0.06931153],
        ],
        dtype=dtype,
    )
    assert (ops.sinkhorn(golden_logits(2, dtype)) - first).abs().max() < tolerance + 5e-9
    once = torch.tensor([0.46707120, 0.37815246, 0.13163064, 0.02314570], dtype=dtype)
    assert (ops.sinkhorn(golden_logits(2, dtype), 1)[0] - once).abs().max() < tolerance + 5e-9
    # The case that tells columns-first from rows-first.
    second = ops.sinkhorn(golden_logits(6, dtype))
    row = torch.tensor([0.15444596, 0.70862059, 0.13641997, 0.00051348], dtype=dtype)
    columns = torch.tensor([1.00062656, 1.00053561, 1.00002231, 0.99881552], dtype=dtype)
    assert (second[0] - row).abs().max() < tolerance + 5e-9
    assert (second.sum(0) - columns).abs().max() < 2 * tolerance + 5e-9


@pytest.mark.parametrize('n', STREAM_COUNTS)
@pytest.mark.parametrize('iterations', [1, 3, 20])
def test_sinkhorn_follows_the_equation(n, iterations, random_seed):
    logits = 3 * torch.randn(n, n, dtype=torch.float64)
    expected = sinkhorn_by_hand(logits.tolist(), iterations)
    torch.testing.assert_close(ops.sinkhorn(logits, iterations), expected, rtol=1e-11, atol=1e-13)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 8),
    spread=st.floats(0, 300),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_sinkhorn_rows_are_exact_however_extreme_the_logits(n, spread, seed, dtype):
    logits = spread * torch.randn(5, n, n, generator=torch.Generator().manual_seed(seed))
    result = ops.sinkhorn(logits.to(dtype))
    assert result.dtype == torch.float32
    assert (result >= 0).all()
    assert (result.sum(-1) - 1).abs().max() < 1e-6


def test_sinkhorn_lets_non_finite_logits_through_and_returns():
    logits = torch.zeros(2, 4, 4)
    logits[0, 1, 2] = float('nan')
    result = ops.sinkhorn(logits)
    assert result[0].isnan().any()
    torch.testing.assert_close(result[1], torch.full((4, 4), 0.25))


def random_mapping_inputs(n, hidden, tokens, dtype):
    return (
        torch.randn(*tokens, n * hidden).to(dtype),
        torch.randn(n * n + 2 * n, n * hidden),
        torch.randn(n * n + 2 * n),
        torch.randn(3),
    )


def mapping_by_tokens(x, weight, bias, alpha, n):
    """Eq 14-19 token by token in fp64, the norm taken before the projection."""
    x, weight, bias, alpha = (t.double() for t in (x, weight, bias, alpha))
    flat = x.reshape(-1, x.shape[-1])
    pre, post, res = [], [], []
    for v in flat:
        normed = v / ((v * v).sum() / v.numel() + ops.NORM_EPS).sqrt()
        h = weight @ normed
        pre.append(torch.sigmoid(alpha[0] * h[:n] + bias[:n]))
        post.append(2 * torch.sigmoid(alpha[1] * h[n : 2 * n] + bias[n : 2 * n]))
        logits = alpha[2] * h[2 * n :] + bias[2 * n :]
        res.append(sinkhorn_by_hand(logits.reshape(n, n).tolist(), 20))
    shape = x.shape[:-1]
    return (
        torch.stack(pre).reshape(*shape, n),
        torch.stack(post).reshape(*shape, n),
        torch.stack(res).reshape(*shape, n, n),
    )


@pytest.mark.parametrize('n', STREAM_COUNTS)
@pytest.mark.parametrize('dtype', MAP_TOLERANCE)
def test_mapping_follows_the_equations(n, dtype, random_seed):
    inputs = random_mapping_inputs(n, 5, (3, 2), dtype)
    for got, expected in zip(
        ops.mapping(*inputs, num_streams=n), mapping_by_tokens(*inputs, n), strict=True
    ):
        assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert (got - expected).abs().max() < MAP_TOLERANCE[dtype]


def test_mapping_of_one_token_needs_no_other_dimension(random_seed):
    one, *others = random_mapping_inputs(4, 8, (), torch.float32)
    grads = []
    for x in (one, one.unsqueeze(0)):
        inputs = [t.clone().requires_grad_() for t in (x, *others)]
        maps = ops.mapping(*inputs, num_streams=4, backend='torch')
        # The rows of H_res sum to one: a plain sum would leave it without a gradient.
        sum(t.square().sum() for t in maps).backward()
        grads.append([t.grad.reshape(-1) for t in inputs])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_mapping_is_fp32_under_autocast(random_seed):
    inputs = random_mapping_inputs(4, 8, (6,), torch.bfloat16)
    plain = ops.mapping(*inputs, num_streams=4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = ops.mapping(*inputs, num_streams=4)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_mapping_of_zero_streams_has_finite_gradients():
    x, weight, bias, alpha = random_mapping_inputs(4, 8, (2,), torch.float32)
    x = torch.zeros_like(x, requires_grad=True)
    sum(t.sum() for t in ops.mapping(x, weight, bias, alpha, num_streams=4)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('n', STREAM_COUNTS)
@pytest.mark.parametrize('dtype', STREAM_TOLERANCE)
def test_streams_follow_the_equation(n, dtype, random_seed):
    x, y = torch.randn(7, n * 5).to(dtype), torch.randn(7, 5).to(dtype)
    bias = torch.randn(5).to(dtype)
    h_pre, h_post, h_res = torch.rand(7, n), torch.rand(7, n), torch.rand(7, n, n)
    streams = x.double().reshape(7, n, 5)
    read = torch.zeros(7, 5, dtype=torch.float64)
    mixed = torch.zeros(7, n, 5, dtype=torch.float64)
    for i in range(n):
        read += h_pre[:, i, None].double() * streams[:, i]
        for j in range(n):
            mixed[:, i] += h_res[:, i, j, None].double() * streams[:, j]
        mixed[:, i] += h_post[:, i, None].double() * (y.double() + bias.double())
    for got, expected in (
        (ops.pre(x, h_pre), read),
        (ops.post_res(x, y, h_post, h_res, bias), mixed.reshape(7, -1)),
    ):
        assert got.dtype == dtype
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < STREAM_TOLERANCE[dtype]


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_gradcheck(n, random_seed):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.autograd.gradcheck(lambda t: ops.sinkhorn(t, 5), leaf(2, n, n))
    torch.autograd.gradcheck(
        lambda *a: ops.mapping(*a, num_streams=n, sinkhorn_iterations=5),
        (leaf(2, 3 * n), leaf(n * n + 2 * n, 3 * n), leaf(n * n + 2 * n), leaf(3)),
    )
    torch.autograd.gradcheck(ops.pre, (leaf(2, 3 * n), leaf(2, n)))
    torch.autograd.gradcheck(
        ops.post_res, (leaf(2, 3 * n), leaf(2, 3), leaf(2, n), leaf(2, n, n), leaf(3))
    )


X, MAPS = torch.randn(6, 32), (torch.rand(6, 4), torch.rand(6, 4, 4))
WEIGHT, BIAS, ALPHA = torch.randn(24, 32), torch.randn(24), torch.randn(3)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: ops.sinkhorn(torch.zeros(4, 3)), 'logits: got shape'),
        (lambda: ops.sinkhorn(torch.zeros(4, 4), 0), 'iterations: got 0'),
        (lambda: ops.sinkhorn(torch.zeros(4, 4, dtype=torch.int64)), 'logits: got torch.int64'),
        (lambda: ops.mapping(X, WEIGHT, BIAS, ALPHA, num_streams=0), 'num_streams: got 0'),
        (lambda: ops.mapping(X, WEIGHT, BIAS, ALPHA, num_streams=5), 'x: got shape'),
        (lambda: ops.mapping(X, WEIGHT[:23], BIAS, ALPHA, num_streams=4), 'weight: got shape'),
        (lambda: ops.mapping(X, WEIGHT, BIAS, ALPHA[:2], num_streams=4), 'alpha: got shape'),
        (
            lambda: ops.mapping(X, WEIGHT, BIAS, ALPHA, num_streams=4, backend='cudnn'),
            "backend: got 'cudnn'",
        ),
        (lambda: ops.pre(X, torch.rand(6, 5)), 'x: got shape'),
        (lambda: ops.pre(X, torch.rand(5, 4)), 'h_pre: got shape'),
        (lambda: ops.post_res(X, torch.rand(6, 9), *MAPS), 'y: got shape'),
        (lambda: ops.post_res(X, torch.rand(6, 8), MAPS[0], MAPS[1][:, :3]), 'h_res: got shape'),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
