"""The mapping, projection to maps, against fp64 autograd of the reference."""

import pytest
import torch
from truth import (
    DTYPES,
    SHAPES,
    TOLERANCE,
    assert_gradients,
    cotangents_of,
    error,
    parameters,
    streams,
    terms_of,
    true_gradients,
    with_gradients,
)

from megatron_mhc import ops
from megatron_mhc.kernels.reference import mapping_ref

NAMES = ('h_pre', 'h_post', 'h_res')
# For eight bf16 streams backward multiplies phi in TF32 (kernels/triton/read_backward.py).
TF32 = 2e-3


def compare(tensors: dict, n: int, wide: float = TOLERANCE[torch.float32].gradients, **options):
    """Maps and the gradients of x, phi, b and alpha."""
    iterations = options.get('sinkhorn_iterations', 20)
    tokens = tensors['x'].shape[:-1]
    device = tensors['x'].device
    shapes = (*tokens, n), (*tokens, n), (*tokens, n, n)
    cotangents = cotangents_of(*(torch.empty(shape, device=device) for shape in shapes))
    got, gradients = with_gradients(
        lambda **t: ops.mapping(**t, num_streams=n, backend='triton', **options),
        tensors,
        cotangents,
    )

    def reference(**t):
        return mapping_ref(**t, num_streams=n, sinkhorn_iterations=iterations)

    want, truth = true_gradients(reference, tensors, cotangents)
    tolerance = TOLERANCE[tensors['x'].dtype]
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < tolerance.maps, f'{name}: {error(a, b):.2e}'
    terms = terms_of(reference, tensors, cotangents, ('bias',))['bias']
    sums = dict.fromkeys(('weight', 'bias', 'alpha'), terms)
    assert_gradients(gradients, truth, tensors, tolerance.gradients, wide, sums)


# With many tokens a program of backward walks over several blocks of a segment.
@pytest.mark.parametrize('shape', [*SHAPES, (4, 275, 5)], ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_maps_and_gradients(shape, dtype, device, random_seed):
    n, tokens, channels = shape
    x = streams(n, tokens, channels, device, dtype)
    wide = TOLERANCE[torch.float32].gradients
    if n == 8 and dtype is torch.bfloat16 and device.type == 'cuda':
        wide = TF32
    compare({'x': x, **parameters(n, channels, device)}, n, wide)


@pytest.mark.parametrize('iterations', [1, 2, 3])
def test_iterations(iterations, device, random_seed):
    x = streams(4, 7, 6, device, torch.float32)
    tensors = {'x': x, **parameters(4, 6, device)}
    compare(tensors, 4, sinkhorn_iterations=iterations)


@pytest.mark.parametrize('precision', ['tf32', 'tf32x3', 'ieee'])
def test_precisions(precision, device, random_seed):
    """They differ on a GPU only: the interpreter multiplies in fp32 whatever it is told."""
    x = streams(4, 21, 40, device, torch.float32)
    tensors = {'x': x, **parameters(4, 40, device)}
    if precision == 'tf32' and device.type == 'cuda':
        options = {'num_streams': 4, 'backend': 'triton', 'precision': precision}
        for got, want in zip(
            ops.mapping(**tensors, **options), mapping_ref(**tensors, num_streams=4), strict=True
        ):
            assert error(got, want.double()) < TF32
    else:
        compare(tensors, 4, precision=precision)


def test_norm_eps_and_zero_streams(device, random_seed):
    """Zero streams give the maps of the bias; gradients stay finite with an eps."""
    tensors = {'x': torch.zeros(3, 24, device=device), **parameters(4, 6, device)}
    leaf = tensors['x'].requires_grad_()
    maps = ops.mapping(**tensors, num_streams=4, norm_eps=1e-6, backend='triton')
    want = mapping_ref(**tensors, num_streams=4, norm_eps=1e-6)
    for a, b in zip(maps, want, strict=True):
        torch.testing.assert_close(a, b)
    sum(a.sum() for a in maps).backward()
    assert leaf.grad.isfinite().all()


def test_scale_of_the_streams_does_not_matter(device, random_seed):
    """The norm takes it out; in fp16 the projection of large streams would overflow."""
    x = streams(4, 6, 33, device, torch.float16)
    tensors = parameters(4, 33, device)
    small, large = (
        ops.mapping(x * scale, **tensors, num_streams=4, backend='triton') for scale in (1, 4096)
    )
    for a, b in zip(small, large, strict=True):
        assert error(a, b.double()) < TOLERANCE[torch.float16].maps


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_streams_stay_in_their_token(value, device, random_seed):
    x = streams(4, 9, 21, device, torch.bfloat16)
    tensors = parameters(4, 21, device)
    clean = ops.mapping(x, **tensors, num_streams=4, backend='triton')
    x[4, 7] = value
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for a, b in zip(ops.mapping(x, **tensors, num_streams=4, backend='triton'), clean, strict=True):
        assert not a[4].isfinite().all()
        assert torch.equal(a[others], b[others])


def test_parameters_in_bf16_and_strided(device, random_seed):
    """Parameters are widened; a gradient arrives in the dtype of its tensor."""
    leaves = {k: v.bfloat16() for k, v in parameters(4, 6, device).items()}
    leaves['weight'] = leaves['weight'].t().contiguous().t()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    x = streams(4, 7, 6, device, torch.float32)
    got = ops.mapping(x, **leaves, num_streams=4, backend='triton')
    want = mapping_ref(x, **leaves, num_streams=4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    sum(a.square().sum() for a in got).backward()
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves.values())
