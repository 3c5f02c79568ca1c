"""F_pre and F_post,res with bias and dropout against fp64 autograd of the reference."""

import pytest
import torch
from truth import (
    DTYPES,
    SHAPES,
    TOLERANCE,
    assert_gradients,
    assert_one_ulp,
    cotangents_of,
    error,
    maps,
    seed_tensor,
    streams,
    true_gradients,
    with_gradients,
)

from megatron_mhc import ops
from megatron_mhc.kernels.reference import post_res_ref, pre_ref
from megatron_mhc.kernels.reference.dropout import dropout_constants, dropout_scale_ref

triton = pytest.importorskip('triton')
tl = triton.language

from megatron_mhc.kernels.triton.device import dropout_scale  # noqa: E402
from megatron_mhc.kernels.triton.launch import Tile, launch  # noqa: E402


def compare(op, reference, tensors: dict, **options) -> None:
    cotangents = cotangents_of(reference(**tensors, **options))
    (got,), gradients = with_gradients(
        lambda **t: op(**t, **options, backend='triton'), tensors, cotangents
    )
    (want,), truth = true_gradients(lambda **t: reference(**t, **options), tensors, cotangents)
    tolerance = TOLERANCE[tensors['x'].dtype]
    assert got.dtype == tensors['x'].dtype
    assert error(got, want) < tolerance.streams, f'{error(got, want):.2e}'
    terms = reference(**{k: t.double().abs() for k, t in tensors.items()}, **options)
    assert_one_ulp(got, want, terms)
    # dbias adds the rows of dy as they are stored and is rounded itself.
    bias = {name: gradients.pop(name) for name in tensors if name == 'bias'}
    for name, gradient in bias.items():
        assert gradient.dtype == tensors[name].dtype
        assert error(gradient, truth.pop(name), truth['y']) < 4 * tolerance.gradients
    assert_gradients(gradients, truth, tensors, tolerance.gradients)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_pre(shape, dtype, device, random_seed):
    n, tokens, channels = shape
    x = streams(n, tokens, channels, device, dtype)
    compare(ops.pre, pre_ref, {'x': x, 'h_pre': torch.rand(tokens, n).to(device)})


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_post_res(shape, dtype, device, random_seed):
    n, tokens, channels = shape
    x = streams(n, tokens, channels, device, dtype)
    y = torch.randn(tokens, channels).to(device, dtype)
    compare(ops.post_res, post_res_ref, {'x': x, 'y': y, **maps(n, tokens, device)})


@pytest.mark.parametrize('dropout', [0.0, 0.3])
@pytest.mark.parametrize('shape', [(1, 5, 1), (2, 7, 6), (4, 6, 261), (8, 3, 37)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_bias_and_dropout(shape, dtype, dropout, device, random_seed):
    n, tokens, channels = shape
    tensors = {
        'x': streams(n, tokens, channels, device, dtype),
        'y': torch.randn(tokens, channels).to(device, dtype),
        **maps(n, tokens, device),
        'bias': torch.randn(channels).to(device, dtype),
    }
    compare(ops.post_res, post_res_ref, tensors, dropout=dropout, seed=seed_tensor(device))


@pytest.mark.parametrize('shape', [(1, 5, 1), (2, 5, 130), (4, 9, 261), (8, 3, 6)], ids=str)
@pytest.mark.parametrize('p', [0.1, 0.5, 0.99])
def test_the_dropout_mask_is_the_reference_s(shape, p, device, random_seed):
    """Bit for bit, forward and backward: x is 0, y is 1, and what is left is the mask itself."""
    n, tokens, channels = shape
    seed = seed_tensor(device)
    want = dropout_scale_ref(tokens, channels, p, seed)
    y = torch.ones(tokens, channels, device=device, requires_grad=True)
    x = torch.zeros(tokens, n * channels, device=device)
    h_post, h_res = torch.ones(tokens, n, device=device), torch.zeros(tokens, n, n, device=device)
    options = {'dropout': p, 'seed': seed}
    out = ops.post_res(x, y, h_post, h_res, **options, backend='triton')
    assert torch.equal(out.view(tokens, n, channels), want[:, None].expand(-1, n, -1))
    out.sum().backward()
    torch.testing.assert_close(y.grad, n * want, rtol=1e-6, atol=0)
    assert torch.equal(y.grad == 0, want == 0)
    by_torch = ops.post_res(x, y, h_post, h_res, **options, backend='torch')
    assert torch.equal(by_torch, out)


def philox(counter: int, seed: int) -> list[int]:
    """Philox 4x32-10 of Salmon et al. (SC'11), Fig 4 and Table 2, in Python integers."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (high >> 32) ^ words[1] ^ key[0],
            high & 0xFFFFFFFF,
            (low >> 32) ^ words[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


def test_the_generator_is_philox(random_seed):
    """Known answer of the authors' test vectors (counter and key zero), and the mask's layout."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = seed_tensor(torch.device('cpu'))
    mask = dropout_scale_ref(5, 7, 0.5, seed) == 0
    for t in range(5):
        for c in range(7):
            word = philox(t * 2 + c // 4, int(seed))[c % 4]
            assert bool(mask[t, c]) == ((word >> 8) < 2**23)


@triton.jit
def mask_kernel(seed_ptr, mask_ptr, first, C, BT: tl.constexpr, BC: tl.constexpr):
    i, c = tl.arange(0, BT), tl.arange(0, BC)
    mask = dropout_scale(seed_ptr, first + i.to(tl.int64), 0, C, 2**23, 1.0, BC)
    tl.store(mask_ptr + i[:, None] * BC + c[None, :], mask)


def test_the_generator_counts_beyond_32_bits(device, random_seed):
    """A token so late that its counter fills more than one word."""
    seed, first, channels = seed_tensor(device), 2**33 + 5, 13
    mask = torch.empty(2, 16, device=device)
    launch(mask_kernel, (1,), seed, mask, first, channels, tile=Tile(2), BT=2, BC=16)
    for t in range(2):
        for c in range(channels):
            word = philox((first + t) * 4 + c // 4, int(seed))[c % 4]
            assert mask[t, c] == float((word >> 8) >= 2**23)


@triton.jit
def scales_kernel(seed_ptr, scale_ptr, threshold, scale, C, BC: tl.constexpr):
    row = tl.arange(0, 1).to(tl.int64)
    scales = dropout_scale(seed_ptr, row, 0, C, threshold, scale, BC)
    tl.store(scale_ptr + tl.arange(0, BC)[None, :], scales)


@pytest.mark.parametrize('p', [1e-9, 2.0**-24, 1 - 2.0**-24, 1 - 1e-9])
def test_the_ends_of_the_range(p, device, random_seed):
    """Thresholds 0, 1, 2^24 - 1 and 2^24, the last of which no word reaches."""
    seed, got = seed_tensor(device), torch.empty(1, 64, device=device)
    constants = dropout_constants(p)
    launch(scales_kernel, (1,), seed, got, *constants, 64, tile=Tile(1), BC=64)
    assert torch.equal(got, dropout_scale_ref(1, 64, p, seed))


@pytest.mark.parametrize('p', [0.1, 0.5])
def test_how_many_elements_are_kept(p, device, random_seed):
    """Within five standard deviations, overall and in each column; neighbours are independent."""
    tokens, channels = 512, 64
    keep = dropout_scale_ref(tokens, channels, p, seed_tensor(device)).cpu() > 0
    for count, mean in (
        (keep.numel(), keep.double().mean()),
        ((tokens - 1) * channels, (keep[1:] == keep[:-1]).double().mean()),
        (tokens * (channels - 1), (keep[:, 1:] == keep[:, :-1]).double().mean()),
    ):
        rate = 1 - p if count == keep.numel() else p**2 + (1 - p) ** 2
        assert abs(mean - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    columns = keep.double().mean(0)
    assert (columns - (1 - p)).abs().max() < 5.5 * (p * (1 - p) / tokens) ** 0.5


def test_seeds_matter_and_repeat(device, random_seed):
    x, y = torch.zeros(8, 64, device=device), torch.ones(8, 16, device=device)
    h = {'h_post': torch.ones(8, 4, device=device), 'h_res': torch.zeros(8, 4, 4, device=device)}

    def draw(seed):
        return ops.post_res(x, y, **h, dropout=0.5, seed=seed, backend='triton')

    # The last two differ in the upper half of the seed only.
    one, two = torch.tensor([5], device=device), torch.tensor([5 + 2**40], device=device)
    assert torch.equal(draw(one), draw(one)) and not torch.equal(draw(one), draw(two))
    # Without a seed the ambient generator decides, and moves on.
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append((draw(None), draw(None)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(*results[0])
    torch.manual_seed(3)
    by_torch = ops.post_res(x, y, **h, dropout=0.5, backend='torch')
    assert torch.equal(by_torch, results[0][0])


@pytest.mark.parametrize('of_x', [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('of_y', [torch.float32, torch.float16], ids=str)
def test_y_in_another_dtype(of_x, of_y, device, random_seed):
    tensors = {
        'x': streams(4, 5, 9, device, of_x),
        'y': torch.randn(5, 9).to(device, of_y),
        **maps(4, 5, device),
        'bias': torch.randn(9).to(device, torch.bfloat16),
    }
    cotangents = cotangents_of(tensors['x'])
    (got,), gradients = with_gradients(
        lambda **t: ops.post_res(**t, backend='triton'), tensors, cotangents
    )
    (want,), truth = true_gradients(post_res_ref, tensors, cotangents)
    assert got.dtype == of_x and error(got, want) < TOLERANCE[of_x].streams
    # dy and dx are rounded where y and x are, dbias always.
    for name in ('x', 'y', 'h_post', 'h_res'):
        limit = TOLERANCE[tensors[name].dtype].gradients
        assert gradients[name].dtype == tensors[name].dtype
        assert error(gradients[name], truth[name]) < limit
    assert error(gradients['bias'], truth['bias'], truth['y']) < 4 * 2.0**-8


def test_maps_expanded_strided_or_in_bf16(device, random_seed):
    """The same maps for every token, a transposed H_res: gradients are summed where they belong."""
    x = torch.randn(3, 2, 4 * 9, device=device)
    y = torch.randn(3, 2, 9, device=device)
    tensors = {
        'x': x,
        'y': y,
        'h_post': torch.rand(4).to(device),
        'h_res': torch.rand(4, 4).to(device),
        'h_pre': torch.rand(4, 6).to(device, torch.bfloat16),
    }

    def chain(backend):
        def run(x, y, h_post, h_res, h_pre):
            h_res = h_res.t().expand(3, 2, 4, 4)
            new = ops.post_res(x, y, h_post.expand(3, 2, 4), h_res, backend=backend)
            return new, ops.pre(x, h_pre.t().reshape(3, 2, 4), backend=backend)

        return run

    cotangents = cotangents_of(x, y)
    got, gradients = with_gradients(chain('triton'), tensors, cotangents)
    want, truth = true_gradients(chain('torch'), tensors, cotangents)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < TOLERANCE[torch.float32].streams
    assert_gradients(gradients, truth, tensors, TOLERANCE[torch.bfloat16].gradients)


def test_leading_strides(device, random_seed):
    """Streams cut out of a larger tensor, and gradients that arrive transposed or expanded."""
    whole = torch.randn(5, 6, 4 * 10, device=device)
    h_pre = torch.rand(3, 5, 4, device=device)
    tensors = {'x': whole, 'h_pre': h_pre}

    def run(backend):
        return lambda x, h_pre: ops.pre(x[:, ::2, :].transpose(0, 1), h_pre, backend=backend)

    for cotangent in (
        torch.randn(10, 5, 3, device=device).permute(2, 1, 0),
        torch.randn(1, 1, 1, device=device).expand(3, 5, 10),
    ):
        (got,), gradients = with_gradients(run('triton'), tensors, (cotangent,))
        (want,), truth = true_gradients(run('torch'), tensors, (cotangent,))
        assert error(got, want) < TOLERANCE[torch.float32].streams
        assert_gradients(gradients, truth, tensors, TOLERANCE[torch.float32].gradients)


def test_dropout_of_the_reference_needs_a_seed():
    x, y = torch.randn(3, 8), torch.randn(3, 4)
    with pytest.raises(ValueError, match='seed: None, but dropout > 0 needs one'):
        post_res_ref(x, y, torch.ones(3, 2), torch.ones(3, 2, 2), dropout=0.1)
