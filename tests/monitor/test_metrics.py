"""The monitors' mathematics against brute force in fp64, and what a report calls trouble."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_mhc import ops
from megatron_mhc.monitor.alarm import largest_ranks, sublayer_name, trouble
from megatron_mhc.monitor.metrics import (
    EPS,
    MAXIMA,
    MEANS,
    Sample,
    composites,
    effective_rank,
    entropy,
    gain_backward,
    gain_forward,
    maxima,
    off_diagonal_mass,
    saturated,
    similarity,
    sums,
)
from megatron_mhc.monitor.output import scalars
from megatron_mhc.monitor.reduce import Report
from megatron_mhc.settings.flags_monitor import MonitorConfig

L, K, N = 6, 5, 4


@pytest.fixture
def h_res(random_seed):
    return torch.randn(L, K, N, N, dtype=torch.float64)


def test_gains_are_the_largest_absolute_sums(h_res):
    forward, backward = gain_forward(h_res), gain_backward(h_res)
    for sublayer, token in itertools.product(range(L), range(K)):
        matrix = h_res[sublayer, token].tolist()
        rows = [sum(abs(value) for value in row) for row in matrix]
        columns = [sum(abs(row[j]) for row in matrix) for j in range(N)]
        assert forward[sublayer, token].item() == pytest.approx(max(rows), rel=1e-14)
        assert backward[sublayer, token].item() == pytest.approx(max(columns), rel=1e-14)


def test_composites_are_ordered_products(h_res):
    products = composites(h_res)
    for first in range(L):
        for token in range(K):
            product = torch.eye(N, dtype=torch.float64)
            for sublayer in range(first, L):
                product = h_res[sublayer, token] @ product
            assert torch.allclose(products[first, token], product, rtol=1e-12)


def test_the_gains_of_mhc_are_bounded(random_seed):
    products = composites(ops.sinkhorn(4 * torch.randn(30, K, N, N, dtype=torch.float64)))
    assert torch.allclose(gain_forward(products), torch.ones(30, K, dtype=torch.float64))
    assert gain_backward(products).max() <= N


def test_values_of_known_maps():
    even, one = torch.full((1, N), 0.3), torch.eye(N)[:1]
    assert entropy(even).item() == pytest.approx(1) and entropy(one).item() == 0
    assert off_diagonal_mass(torch.eye(N)).item() == 0
    assert off_diagonal_mass(torch.full((N, N), 1 / N)).item() == pytest.approx(1 - 1 / N)
    assert similarity(torch.full((N, N), 2.0)).item() == pytest.approx(1)
    assert similarity(torch.diag(torch.tensor([1.0, 2, 3, 4]))).item() == 0


def test_columns_are_sums_over_tokens(h_res):
    x = torch.randn(L, K, N, 8, dtype=torch.float64)
    pre, post = torch.rand(2, L, K, N, dtype=torch.float64)
    y, logits, gradient = torch.randn(3, L, K, 8, dtype=torch.float64)
    gram = x @ x.transpose(-1, -2) / 8
    sample = Sample(pre, post, h_res, gram, y.square().mean(-1), logits, gradient)
    table = sums(sample, composites(h_res))
    means = dict(zip(MEANS, (table / K).unbind(-1), strict=False))
    rms = x.square().mean(-1).sqrt()
    assert torch.allclose(means['stream-rms'], rms.mean((1, 2)))
    assert torch.allclose(means['stream-norm-ratio'], (rms.amin(-1) / rms.amax(-1)).mean(1))
    pairs = itertools.combinations(range(N), 2)
    cosines = [torch.cosine_similarity(x[:, :, i], x[:, :, j], dim=-1) for i, j in pairs]
    assert torch.allclose(means['stream-similarity'], torch.stack(cosines).mean(0).mean(1))
    assert torch.allclose(means['row-sum-error'], (h_res.sum(-1) - 1).abs().amax(-1).mean(1))
    assert torch.allclose(means['column-sum-error'], (h_res.sum(-2) - 1).abs().amax(-1).mean(1))
    added = torch.einsum('lki,lkc->lkic', post, y).flatten(-2).norm(dim=-1)
    kept = (h_res @ x).flatten(-2).norm(dim=-1)
    assert torch.allclose(means['write-share'], (added / (added + kept)).mean(1))
    shares = torch.linalg.svdvals(x).square() / x.square().sum((-2, -1)).unsqueeze(-1)
    ranks = torch.special.entr(shares).sum(-1).exp()
    assert torch.allclose(means['stream-effective-rank'], ranks.mean(1))
    maps = (table / K)[:, -2 * N * N :].unflatten(-1, (2, N, N))
    assert torch.allclose(maps[:, 0], h_res.mean(1))
    assert torch.allclose(maps[:, 1], composites(h_res).mean(1))
    largest = dict(zip(MAXIMA, maxima(sample).unbind(-1), strict=True))
    assert torch.equal(largest['pre-max'], pre.amax((1, 2)))
    assert torch.equal(-largest['post-min'], post.amin((1, 2)))
    assert torch.equal(largest['res-logit-max'], logits.abs().amax((1, 2)))
    assert torch.equal(largest['res-logit-grad-max'], gradient.abs().amax((1, 2)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_effective_rank_of_known_streams(random_seed, dtype):
    one = torch.randn(1, 32, dtype=dtype)
    several = torch.linalg.qr(torch.randn(32, N, dtype=dtype)).Q.T

    def rank(streams):
        return effective_rank(streams @ streams.T).item()

    assert rank(one.expand(N, -1)) == pytest.approx(1, abs=2e-5)
    assert rank(several) == pytest.approx(N, rel=1e-5)
    assert rank(several[:1] + torch.zeros(N, 1, dtype=dtype)) == pytest.approx(1, abs=2e-5)
    assert rank(torch.cat([several[:2], several[:2]])) == pytest.approx(2, rel=1e-4)
    # All pairs at one cosine: eigenvalues 1 + (n - 1) c and 1 - c.
    cosine = 0.9
    gram = torch.full((N, N), cosine, dtype=dtype) + (1 - cosine) * torch.eye(N, dtype=dtype)
    shares = [(1 + (N - 1) * cosine) / N, *[(1 - cosine) / N] * (N - 1)]
    wanted = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(gram).item() == pytest.approx(wanted, rel=1e-5)
    broken = effective_rank(torch.stack([gram * math.nan, gram]))
    assert broken[0].isnan() and broken[1].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize('gap', [8.0, 12.0, 20.0, 40.0])
def test_a_saturated_row_is_one_that_no_gradient_reaches(random_seed, gap):
    """Stream 0 is kept apart from the others, which go on learning."""
    logits = torch.randn(K, N, N)
    logits[:, 0, 1:] -= gap
    logits[:, 1:, 0] -= gap
    logits.requires_grad_()
    h_res = ops.sinkhorn(logits)
    weights = torch.randn(K, N, N)
    (gradient,) = torch.autograd.grad((weights * h_res).sum(), logits)
    lost = h_res[:, 0, 1:].double().sum(-1) <= EPS
    reached = gradient[:, 0].abs().amax(-1) / weights.abs().amax((1, 2))
    assert torch.equal(saturated(h_res), lost.float() / N)
    assert lost.tolist() == [gap > 16] * K
    assert (reached[lost] < 50 * EPS).all() and (reached[~lost] > EPS / 10).all()
    assert (gradient[:, 1:].abs().amax((1, 2)) > 1e-3).all()


def made(changes: dict | None = None, present=(True,) * L) -> Report:
    """A healthy report in which ``changes`` are made: (metric, sublayer) -> value."""
    zeros = ('nonfinite-streams', 'nonfinite-maps', 'nonfinite-outputs', 'mapping-grad-norm')
    ones = [
        f'amax-{kind}gain-{way}' for kind in ('', 'composite-') for way in ('forward', 'backward')
    ]
    metrics = {name: torch.zeros(L) for name in zeros} | {name: torch.ones(L) for name in ones}
    for (name, sublayer), value in (changes or {}).items():
        metrics[name][sublayer] = value
    maps = torch.eye(N).expand(L, N, N)
    rank = torch.where(torch.tensor(present), torch.arange(L) // 3, -1)
    return Report(metrics, maps, maps, rank)


def made_of_streams(saturation: dict[int, float], ranks: list[float]) -> Report:
    report = made()
    report.metrics['res-saturated'] = torch.tensor([saturation.get(s, 0.0) for s in range(L)])
    report.metrics['stream-effective-rank'] = torch.tensor(ranks)
    return report


WATCHED = MonitorConfig(interval=1, alarm='warn', alarm_gain=3.0)


@pytest.mark.parametrize(
    ('changes', 'norm', 'where', 'what'),
    [
        ({('nonfinite-maps', 3): 2}, 1.0, 'layer 2 mlp (pipeline rank 1)', 'H_post or H_res'),
        # The first sublayer, and what a forward meets first in it.
        (
            {
                ('nonfinite-outputs', 4): 1,
                ('nonfinite-outputs', 2): 1,
                ('nonfinite-streams', 3): 1,
                ('amax-gain-forward', 0): 99,
            },
            math.nan,
            'layer 2 attention (pipeline rank 0)',
            'output is not finite',
        ),
        ({('nonfinite-streams', 0): 1}, math.nan, 'layer 1 attention', 'embedding'),
        # A backward begins at the end.
        (
            {('mapping-grad-norm', 4): math.inf, ('mapping-grad-norm', 1): math.nan},
            math.nan,
            'layer 3 attention',
            'gradient of its mapping',
        ),
        ({}, math.inf, 'the gradient norm is inf', 'embedding and the output layer'),
        (
            {('amax-gain-backward', 2): 3.5, ('amax-composite-gain-forward', 0): 9},
            1.0,
            'layer 2 attention (pipeline rank 0): H_res has amax gain 3.5',
            '--mhc-alarm-gain',
        ),
        # The product from the end exceeds the threshold at sublayer 3 first.
        (
            {('amax-composite-gain-backward', s): 9.0 - s for s in range(4)},
            1.0,
            'layer 2 mlp (pipeline rank 1): the product',
            'gain 6',
        ),
    ],
)
def test_trouble_names_the_first_sublayer(changes, norm, where, what):
    line = trouble(made(changes), WATCHED, norm)
    assert line.startswith(where) and what in line and '\n' not in line


def test_saturation_names_the_first_sublayer():
    ranks = [1.0, *[2.0] * (L - 1)]
    line = trouble(made_of_streams({2: 0.25, 4: 1.0}, ranks), WATCHED, 1.0)
    assert line.startswith('layer 2 attention (pipeline rank 0): 25% of the rows'), line
    assert '--mhc-alarm-saturation' in line and '\n' not in line
    assert trouble(made_of_streams({2: 0.1}, ranks), WATCHED, 1.0) is None


def test_collapse_is_of_streams_that_had_come_apart():
    start, apart = made_of_streams({}, [1.0] * L), made_of_streams({}, [1.0, *[1.5] * (L - 1)])
    # Under most starts streams are equal at first, and under some they stay so.
    ranks = largest_ranks(start, None)
    assert trouble(start, WATCHED, 1.0, ranks) is None
    ranks = largest_ranks(apart, ranks)
    assert trouble(apart, WATCHED, 1.0, ranks) is None
    # A report without samples changes nothing.
    ranks = largest_ranks(made(), ranks)
    line = trouble(start, WATCHED, 1.0, largest_ranks(start, ranks))
    assert line.startswith('layer 1 mlp (pipeline rank 0): the streams'), line
    assert '1.00000 after 1.500' in line and '--mhc-alarm-rank' in line and '\n' not in line
    near = made_of_streams({}, [1.0] * (L - 1) + [1.002])
    line = trouble(near, MonitorConfig(interval=1, alarm='warn', alarm_rank=1.0), 1.0, ranks)
    assert line is None


def test_no_trouble():
    assert trouble(made(), WATCHED, 1.0) is None
    # A step that the loss scaler skipped has no norm, and its gradients are no news.
    assert trouble(made({('mapping-grad-norm', 1): math.inf}), WATCHED, None) is None


def test_scalars_of_half_layers_leave_out_what_is_not_there():
    norms = {('mapping-grad-norm', 0): 3.0, ('mapping-grad-norm', 5): 4.0}
    report = made(norms, (True, True, False, True, True, True))
    values = scalars(report, per_layer=False)
    assert values['mhc/mapping-grad-norm'] == 5 and values['mhc/amax-gain-forward'] == 1
    every = scalars(report, per_layer=True)
    # With the entries of H_res.
    assert len(every) == (len(values) + N * N) * 6
    assert every['mhc/h-res-1-1'] == 1 and every['mhc/h-res-1-2/layer-3-mlp'] == 0
    assert every['mhc/mapping-grad-norm/layer-3-mlp'] == 4
    assert 'mhc/mapping-grad-norm/layer-2-attention' not in every


def test_sublayers_are_named_as_megatron_numbers_layers():
    assert [sublayer_name(s) for s in (0, 1, 4)] == [
        'layer 1 attention',
        'layer 1 mlp',
        'layer 3 attention',
    ]
    hybrid = [sublayer_name(s, 'M*|G-/*-') for s in (0, 2, 4, 7)]
    assert hybrid == ['layer 1 mamba', 'layer 2 attention', 'layer 3 gdn', 'layer 4 mlp']
