"""Other projects' conventions against their formulas, restated in fp64 in their own orientation."""

from __future__ import annotations

import logging

import pytest
import torch
from truth import (
    TOLERANCE,
    assert_gradients,
    cotangents_of,
    error,
    maps,
    parameters,
    streams,
    with_gradients,
)

from megatron_mhc import ops
from megatron_mhc.kernels import backend
from megatron_mhc.kernels.numerics import NUMERICS

CPU = torch.device('cpu')
EPS = 1e-6
# With an H_res that is not I.
OTHERS = [n for n, r in NUMERICS.items() if n != 'paper' and r.manifold == 'sinkhorn']
# Those that keep and apply the transpose of our H_res.
TRANSPOSED = ('deepseek-v4', 'megatron-dev', 'glm-5.3')
NORM_EPS = {'deepseek-v4': 1e-6, 'megatron-dev': 1e-6, 'megatron-main': 1e-6, 'glm-5.3': 1e-5}
MIX_IN_STEPS = ('megatron-main', 'glm-5.3')


def stored(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Rows of res in the order of those who transpose: L[j, i] where ours is L[i, j]."""
    order = [2 * n + j * n + i for i in range(n) for j in range(n)]
    return rows[[*range(2 * n), *order]]


def formula(name, x, weight, bias, alpha, n, passes, eps=None):
    """Their maps, from parameters as they store them; H_res as it mixes, ``H x``."""
    eps = NORM_EPS[name] if eps is None else eps
    square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    if name.startswith('megatron'):
        normed = x / (square.sqrt() + eps)
    else:
        normed = x / (square + eps).sqrt()
    if name in TRANSPOSED:
        weight, bias = stored(weight, n), stored(bias, n)
    projected = normed @ weight.T
    pre, post, res = (
        part * factor + offset
        for part, factor, offset in zip(
            projected.split([n, n, n * n], -1), alpha, bias.split([n, n, n * n]), strict=True
        )
    )
    res = res.reshape(*res.shape[:-1], n, n)
    post = 2 / (1 + (-post).exp())
    pre = 1 / (1 + (-pre).exp())
    if name == 'megatron-main':
        m = res.exp()
        for _ in range(passes):
            m = m / m.sum(-1, keepdim=True).clamp(min=EPS)
            m = m / m.sum(-2, keepdim=True).clamp(min=EPS)
        return pre, post, m
    m = res.exp() / res.exp().sum(-1, keepdim=True) + EPS
    for step in range(passes):
        if step:
            m = m / (m.sum(-1, keepdim=True) + EPS)
        m = m / (m.sum(-2, keepdim=True) + EPS)
    return pre + EPS, post, m.transpose(-1, -2)


def given(n: int, tokens: int = 23, channels: int = 9, spread: float = 3.0, dtype=torch.float32):
    tensors = parameters(n, channels, CPU)
    # Peaked, so that 20 passes are not the limit and the order of them can be told.
    tensors['bias'][2 * n :] *= spread
    return {'x': streams(n, tokens, channels, CPU, dtype), **tensors}


@pytest.mark.parametrize('name', OTHERS)
def test_every_eps_stands_where_theirs_does(name, random_seed):
    """In fp64, where one of 1e-6 left out or put elsewhere is a thousand times what is allowed."""
    n = 4
    tensors = {key: value.double() for key, value in given(n).items()}
    # Streams in which the place of the norm's eps can be told.
    tensors['x'] *= torch.logspace(-4, 0, 23, dtype=torch.double)[:, None]
    options = {'num_streams': n, 'norm_eps': NORM_EPS[name]}
    ours = ops.mapping(**tensors, **options, numerics=name)
    wanted = formula(name, *tensors.values(), n, 20)
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() < 1e-12
    paper = ops.mapping(**tensors, **options)
    assert (paper[2] - wanted[2]).abs().max() > 1e-7
    apart = (paper[0] - wanted[0]).abs().min()
    # That of H_pre, but where the norm moves it too.
    assert apart > 0 if name.startswith('megatron') else abs(apart - EPS) < 1e-12
    placed = (paper[1] - wanted[1]).abs().max()
    assert placed > 1e-5 if name.startswith('megatron') else placed < 1e-12


@pytest.mark.parametrize('passes', [1, 20])
@pytest.mark.parametrize('n', [1, 2, 3, 4])
@pytest.mark.parametrize('name', OTHERS)
def test_maps_and_gradients_are_theirs(name, n, passes, random_seed):
    tensors = given(n, spread=1.0)
    eps = NORM_EPS[name]

    def ours(x, weight, bias, alpha):
        options = {'num_streams': n, 'sinkhorn_iterations': passes, 'norm_eps': eps}
        return ops.mapping(x, weight, bias, alpha, **options, numerics=name)

    def theirs(x, weight, bias, alpha):
        return formula(name, x, weight, bias, alpha, n, passes)

    wide = {key: value.double() for key, value in tensors.items()}
    cotangents = cotangents_of(*ours(**tensors))
    got, got_gradients = with_gradients(ours, tensors, cotangents)
    want, gradients = with_gradients(theirs, wide, tuple(c.double() for c in cotangents))
    tolerance = TOLERANCE[torch.float32]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and error(a, b) < tolerance.maps
    assert_gradients(got_gradients, gradients, tensors, tolerance.gradients)


def test_sinkhorn_alone_is_that_of_the_mapping(random_seed):
    n = 3
    logits = 3 * torch.randn(7, n, n, dtype=torch.double)
    for name in OTHERS:
        bias = torch.cat([torch.zeros(2 * n, dtype=torch.double), logits[0].flatten()])
        zero = torch.zeros(n * n + 2 * n, n, dtype=torch.double)
        x, alpha = torch.ones(1, n, dtype=torch.double), torch.ones(3, dtype=torch.double)
        _, _, wanted = formula(name, x, zero, bias, alpha, n, 20)
        assert (ops.sinkhorn(logits, numerics=name)[:1] - wanted).abs().max() < 1e-12
    assert torch.equal(ops.sinkhorn(logits, numerics='paper'), ops.sinkhorn(logits))


@pytest.mark.parametrize('name', OTHERS)
def test_what_they_round_is_rounded(name, random_seed):
    n, dtype = 4, torch.bfloat16
    tensors = given(n, dtype=dtype, spread=1.0)
    found = ops.mapping(**tensors, num_streams=n, norm_eps=NORM_EPS[name], numerics=name)
    wide = {key: value.double() for key, value in tensors.items()}
    wanted = formula(name, *wide.values(), n, 20)
    rounded = {
        'deepseek-v4': (),
        'glm-5.3': ('post', 'res'),
        'megatron-dev': ('pre', 'post', 'res'),
        'megatron-main': ('pre', 'post', 'res'),
    }[name]
    for key, got, want in zip(('pre', 'post', 'res'), found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, got.to(dtype).float()) == (key in rounded)
        limit = TOLERANCE[dtype].streams if key in rounded else TOLERANCE[dtype].maps
        if name == 'megatron-main':
            # 40 divisions, each rounded, of logits that are.
            limit = 4e-2
            assert key != 'res' or error(got, want) > 1e-3
        assert error(got, want) < limit


@pytest.mark.parametrize('dropout', [0.0, 0.4])
@pytest.mark.parametrize('name', NUMERICS)
def test_the_mix_is_rounded_as_theirs(name, dropout, random_seed):
    """Of two terms rounded apart, bit for bit; of the others, bit for bit that of the paper."""
    n, tokens, channels, dtype = 4, 11, 6, torch.bfloat16
    x = streams(n, tokens, channels, CPU, dtype)
    y, bias = torch.randn(tokens, channels).to(dtype), torch.randn(channels).to(dtype)
    own = {key: value.to(dtype).float() for key, value in maps(n, tokens, CPU).items()}
    seed = torch.tensor([random_seed])
    options = {'dropout': dropout, 'seed': seed}
    paper = ops.post_res(x, y, **own, bias=bias, **options)
    found = ops.post_res(x, y, **own, bias=bias, **options, numerics=name)
    if name not in MIX_IN_STEPS:
        assert torch.equal(found, paper)
        return
    x = x.unflatten(-1, (n, channels))
    # Products of two bf16 numbers are exact in fp64, and so are sums of four of them here.
    mixed = (own['h_res'].double() @ x.double()).to(dtype)
    post = own['h_post'].to(dtype).unsqueeze(-1)
    written = post * y.unsqueeze(-2) + post * bias
    alone = ops.post_res(torch.zeros_like(x).flatten(-2), y, **own, bias=bias, **options)
    kept = alone.unflatten(-1, (n, channels)) != 0
    factor = 1 / (1 - dropout)
    written = torch.where(kept, (written.float() * factor).to(dtype), 0)
    assert torch.equal(found.unflatten(-1, (n, channels)), mixed + written)
    assert not torch.equal(found, paper)


@pytest.mark.parametrize('name', OTHERS)
def test_gradients_of_the_mix(name, random_seed):
    n, tokens, channels = 4, 11, 6
    tensors = {
        'x': streams(n, tokens, channels, CPU, torch.float32),
        'y': torch.randn(tokens, channels),
        **maps(n, tokens, CPU),
        'bias': torch.randn(channels),
    }
    cotangents = (torch.randn(tokens, n * channels),)
    _, got = with_gradients(lambda **t: ops.post_res(**t, numerics=name), tensors, cotangents)

    def theirs(x, y, h_post, h_res, bias):
        mixed = h_res @ x.unflatten(-1, (n, channels))
        return (mixed + h_post.unsqueeze(-1) * (y + bias).unsqueeze(-2)).flatten(-2)

    wide = {key: value.double() for key, value in tensors.items()}
    _, want = with_gradients(theirs, wide, (cotangents[0].double(),))
    assert_gradients(got, want, tensors, TOLERANCE[torch.float32].gradients)


@pytest.mark.parametrize('name', NUMERICS)
def test_tokens_of_zeros_and_too_large_ones(name, random_seed):
    n = 4
    tensors = given(n)
    tensors['x'][0] = 0
    leaves = {key: value.requires_grad_() for key, value in tensors.items()}
    found = ops.mapping(**leaves, num_streams=n, numerics=name)
    sum(m.square().sum() for m in found).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    large = {key: value.detach().clone() for key, value in tensors.items()}
    large['x'][1] = 1e20
    for m in ops.mapping(**large, num_streams=n, numerics=name):
        assert m[1].isnan().all() and m[2:].isfinite().all()


def test_kernels_leave_it_to_torch_and_say_why(caplog, monkeypatch, random_seed):
    """Asked for they refuse; else one line an op. Reads and writes of the maps stay theirs."""
    n, dtype = 4, torch.bfloat16
    tensors = given(n, tokens=5, channels=6)
    with pytest.raises(ValueError, match='mapping as --mhc-numerics paper does, not as glm-5.3'):
        ops.mapping(**tensors, num_streams=n, backend='triton', numerics='glm-5.3')
    with pytest.raises(ValueError, match="numerics: got 'v4', wanted one of"):
        ops.mapping(**tensors, num_streams=n, numerics='v4')
    monkeypatch.setattr(backend, 'kernel_obstacle', lambda device, dtype, n: None)
    backend._log_once.cache_clear()
    cuda = torch.device('cuda')
    with caplog.at_level(logging.INFO, 'megatron_mhc.kernels'):
        for _ in range(2):
            assert not backend.use_triton('auto', 'mapping', cuda, dtype, n, 'megatron-dev')
            assert backend.use_triton('auto', 'pre', cuda, dtype, n, 'megatron-dev')
            assert backend.use_triton('auto', 'post_res', cuda, dtype, n, 'megatron-dev')
            assert not backend.use_triton('auto', 'post_res', cuda, dtype, n, 'megatron-main')
    said = [record.getMessage() for record in caplog.records if 'reference' in record.getMessage()]
    assert [line.split(':')[0] for line in said] == ['mapping', 'post_res']
    assert all('because the kernels compute' in line for line in said)
    backend._log_once.cache_clear()
