"""A sublayer's two ends: ``read``, ``write`` and the fused edge ``write_read``."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from truth import (
    CHAIN,
    DTYPES,
    TOLERANCE,
    assert_gradients,
    assert_one_ulp,
    cotangents_of,
    error,
    parameters,
    seed_tensor,
    streams,
    terms_of,
    true_gradients,
    with_gradients,
)

from megatron_mhc import ops
from megatron_mhc.kernels.reference import mapping_ref, post_res_ref, pre_ref

# n, T, C: one value a stream; tails in tokens and channels, several programs and splits.
SHAPES = [(1, 21, 1), (2, 35, 67), (4, 66, 35), (4, 3, 261), (8, 3, 19)]
OPTIONS = {'num_streams': 4, 'sinkhorn_iterations': 5}


def two_sublayers(n, tokens, channels, device, dtype) -> dict[str, torch.Tensor]:
    """Streams, the outputs of two sublayers, y's biases, and the parameters of two mappings."""
    tensors = {
        'x': streams(n, tokens, channels, device, dtype),
        'y1': torch.randn(tokens, channels).to(device, dtype),
        'y2': torch.randn(tokens, channels).to(device, dtype),
        'y_bias': torch.randn(channels).to(device, dtype),
    }
    for layer in '12':
        mapping = parameters(n, channels, device)
        tensors |= {name + layer: tensor for name, tensor in mapping.items()}
    return tensors


def mapping_of(t: dict, layer: str) -> tuple[torch.Tensor, ...]:
    return tuple(t[name + layer] for name in ('weight', 'bias', 'alpha'))


def chain(n, dropout=0.0, seed=None, fused=True, backend='triton', iterations=20):
    """read, write_read (or write and read), write -> u1, x_new, u2, the last streams, maps."""
    options = {'num_streams': n, 'sinkhorn_iterations': iterations, 'backend': backend}
    mask = {'dropout': dropout, 'seed': seed}

    def run(**t):
        u1, first = ops.read(t['x'], *mapping_of(t, '1'), **options)
        y1, y2 = t['y1'] + u1, t['y2']
        y_bias = t['y_bias']
        if fused:
            x_new, u2, second = ops.write_read(
                y1, first, *mapping_of(t, '2'), **options, y_bias=y_bias, **mask
            )
        else:
            x_new = ops.write(y1, first, y_bias, **mask, backend=backend)
            u2, second = ops.read(x_new, *mapping_of(t, '2'), **options)
        out = ops.write(y2 * u2, second, **mask, backend=backend)
        return u1, x_new, u2, out, second.h_post, second.h_res

    return run


def true_chain(n, dropout=0.0, seed=None, stored=None, iterations=20):
    """The same from the reference ops; ``stored`` are outputs that take the place of the exact
    ones downstream, since what is stored in 16 bits is what later sublayers read."""
    options = {'num_streams': n, 'sinkhorn_iterations': iterations}
    u1_at, x_at, u2_at = stored[:3] if stored else (None,) * 3

    def as_stored(exact, value):
        return exact if value is None else exact + (value.double() - exact).detach()

    def run(**t):
        pre, post, res = mapping_ref(t['x'], *mapping_of(t, '1'), **options)
        u1 = pre_ref(t['x'], pre)
        y1 = t['y1'] + as_stored(u1, u1_at)
        if stored:
            y1 = as_stored(y1, y1.to(u1_at.dtype))
        x_new = post_res_ref(t['x'], y1, post, res, t['y_bias'], dropout, seed)
        x2 = as_stored(x_new, x_at)
        pre, post, res = mapping_ref(x2, *mapping_of(t, '2'), **options)
        u2 = pre_ref(x2, pre)
        y2 = t['y2'] * as_stored(u2, u2_at)
        if stored:
            y2 = as_stored(y2, y2.to(u2_at.dtype))
        return u1, x_new, u2, post_res_ref(x2, y2, post, res, None, dropout, seed), post, res

    return run


def sums_of(function, tensors, cotangents, truth) -> dict[str, torch.Tensor]:
    """The terms of every gradient that is a sum over tokens; y's bias adds the rows of dy."""
    terms = terms_of(function, tensors, cotangents, ('bias1', 'bias2'))
    parameters = [(name, layer) for name in ('weight', 'bias', 'alpha') for layer in '12']
    return {name + layer: terms[f'bias{layer}'] for name, layer in parameters} | {
        'y_bias': truth['y1']
    }


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_chain_and_its_gradients(shape, dtype, device, random_seed):
    """Every output carries a gradient: x_new is used elsewhere, too, and so are the maps."""
    n, tokens, channels = shape
    tensors = two_sublayers(n, tokens, channels, device, dtype)
    dropout = {'dropout': 0.2, 'seed': seed_tensor(device), 'iterations': 5}
    x, y = tensors['x'], tensors['y1']
    small = torch.empty(tokens, n, device=device), torch.empty(tokens, n, n, device=device)
    cotangents = cotangents_of(y, x, y, x, *small)
    got, gradients = with_gradients(chain(n, **dropout), tensors, cotangents)
    stored = None if dtype is torch.float32 else got
    reference = true_chain(n, **dropout, stored=stored)
    want, truth = true_gradients(reference, tensors, cotangents)
    tolerance = TOLERANCE[dtype]
    for name, a, b in zip(('u1', 'x_new', 'u2', 'out'), got, want, strict=False):
        assert a.dtype == dtype
        limit = tolerance.streams if dtype.itemsize == 2 else tolerance.maps
        assert error(a, b) < limit + 1e-5, f'{name}: {error(a, b):.2e}'
    for a, b in zip(got[4:], want[4:], strict=True):
        assert error(a, b) < tolerance.maps
    limit = CHAIN[dtype]
    sums = sums_of(reference, tensors, cotangents, truth)
    assert_gradients(gradients, truth, tensors, limit, limit, sums)


@pytest.mark.parametrize('shape', [(1, 5, 1), (2, 9, 67), (4, 66, 9), (8, 3, 5)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_edge_changes_no_bit(shape, dtype, device, random_seed):
    """Stored streams, maps and all gradients are those of write and then read."""
    n, tokens, channels = shape
    tensors = two_sublayers(n, tokens, channels, device, dtype)
    dropout = {'dropout': 0.2, 'seed': seed_tensor(device), 'iterations': 3}
    x, y = tensors['x'], tensors['y1']
    cotangents = (*cotangents_of(y, x, y, x), None, None)
    one, two = (
        with_gradients(chain(n, **dropout, fused=fused), tensors, cotangents)
        for fused in (True, False)
    )
    for a, b in zip(one[0], two[0], strict=True):
        assert torch.equal(a, b)
    for name, gradient in one[1].items():
        assert torch.equal(gradient, two[1][name]), name


def test_backward_twice_is_bit_equal(device, random_seed):
    tensors = two_sublayers(4, 37, 21, device, torch.bfloat16)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = chain(4, dropout=0.2, seed=seed_tensor(device))(**leaves)
    cotangents = cotangents_of(*outputs)
    first, second = (
        torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_read_and_write_are_within_one_ulp(dtype, device, random_seed):
    tensors = two_sublayers(4, 19, 37, device, dtype)
    u, carried = ops.read(tensors['x'], *mapping_of(tensors, '1'), num_streams=4, backend='triton')
    out = ops.write(tensors['y1'], carried)
    x, y = tensors['x'].double(), tensors['y1'].double()
    pre, post, res = mapping_ref(x, *(p.double() for p in mapping_of(tensors, '1')), num_streams=4)
    # Maps differ by 1e-5 at most, which is no ulp but may move a sum to the next tie: hence terms.
    assert_one_ulp(u, pre_ref(x, pre), 16 * pre_ref(x.abs(), pre))
    terms = 16 * post_res_ref(x.abs(), y.abs(), post, res)
    assert_one_ulp(out, post_res_ref(x, y, post, res), terms)


@pytest.mark.parametrize('used', ['u', 'carried', 'h_post', 'x_new', 'u of the fused edge'])
def test_outputs_that_are_not_used(used, device, random_seed):
    """No write, no u, a map alone: what has no gradient adds nothing to the others."""
    tensors = two_sublayers(4, 5, 9, device, torch.float32)
    del tensors['y2']

    def run(backend):
        def apply(**t):
            options = {**OPTIONS, 'backend': backend}
            u, carried = ops.read(t['x'], *mapping_of(t, '1'), **options)
            if used in ('u', 'h_post'):
                return {'u': u, 'h_post': carried.h_post}[used]
            if used == 'carried':
                return ops.write(t['y1'], carried, backend=backend)
            x_new, u, _ = ops.write_read(
                t['y1'], carried, *mapping_of(t, '2'), **options, y_bias=t['y_bias']
            )
            return x_new if used == 'x_new' else u

        return apply

    out = run('torch')(**tensors)
    cotangents = cotangents_of(out)
    (got,), gradients = with_gradients(run('triton'), tensors, cotangents)
    (want,), truth = true_gradients(run('torch'), tensors, cotangents)
    assert error(got, want) < TOLERANCE[torch.float32].maps
    for name, gradient in truth.items():
        if gradient is None:
            # None, or the zeros of a function that was told nothing about this tensor.
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            assert error(gradients[name], gradient) < TOLERANCE[torch.float32].gradients, name


def test_parameters_alone_and_y_alone(device, random_seed):
    """The first layer may stand on streams that need no gradient, and a mapping be frozen."""
    tensors = two_sublayers(4, 5, 9, device, torch.float32)
    weight, y = tensors['weight1'].requires_grad_(), tensors['y1'].requires_grad_()
    got, want = [], []
    for backend, grads in (('triton', got), ('torch', want)):
        for leaf in (weight, y):
            weight.grad = y.grad = None
            weight.requires_grad_(leaf is weight)
            y.requires_grad_(leaf is y)
            u, carried = ops.read(
                tensors['x'], *mapping_of(tensors, '1'), **OPTIONS, backend=backend
            )
            ops.write(y, carried, backend=backend).square().sum().backward()
            grads.append(leaf.grad)
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) < TOLERANCE[torch.float32].gradients


def test_leading_dimensions(device, random_seed):
    """[s, b] streams that are a strided view, y in another dtype, gradients that are expanded."""
    x = torch.randn(3, 8, 4 * 6, device=device)[:, ::4]
    y = torch.randn(2, 3, 6, device=device, dtype=torch.bfloat16).transpose(0, 1)
    tensors = {'x': x, 'y': y, **parameters(4, 6, device)}

    def run(backend):
        def apply(x, y, **mapping):
            options = {**OPTIONS, **mapping, 'backend': backend}
            u, carried = ops.read(x, **options)
            return ops.write_read(y, carried, **options)[0], u

        return apply

    cotangents = torch.randn(1, 2, 1, device=device).expand(3, 2, 24), torch.ones_like(x[..., :6])
    got, gradients = with_gradients(run('triton'), tensors, cotangents)
    want, truth = true_gradients(run('torch'), tensors, cotangents)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and error(a, b) < TOLERANCE[torch.float32].maps
    limit = TOLERANCE[torch.bfloat16].gradients
    assert_gradients(gradients, truth, tensors, limit, sums={'alpha': truth['bias']})


def test_both_backends_drop_the_same(device, random_seed):
    tensors = two_sublayers(4, 5, 9, device, torch.float32)
    seed = seed_tensor(device)
    outs = [chain(4, 0.4, seed, backend=backend)(**tensors) for backend in ('triton', 'torch')]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('reentrant', [True, False])
def test_recomputation_is_bit_equal(reentrant, device, random_seed):
    """Two sublayers under torch's checkpoint; dropout takes the ambient generator's seeds."""
    tensors = two_sublayers(4, 7, 9, device, torch.bfloat16)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    names = list(leaves)

    def sublayers(*values):
        return chain(4, dropout=0.5, iterations=3)(**dict(zip(names, values, strict=True)))[3]

    results = []
    for recompute in (False, True):
        torch.manual_seed(11)
        for leaf in leaves.values():
            leaf.grad = None
        if recompute:
            out = checkpoint(sublayers, *leaves.values(), use_reentrant=reentrant)
        else:
            out = sublayers(*leaves.values())
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
