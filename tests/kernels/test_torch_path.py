"""The torch path of a sublayer: its written-out gradients, what it keeps, and torch.compile."""

import pytest
import torch
from truth import (
    TOLERANCE,
    assert_gradients,
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

CPU = torch.device('cpu')


def tensors_of(n, tokens, channels, dtype):
    y, bias = torch.randn(tokens, channels), torch.randn(channels)
    return {
        'x': streams(n, tokens, channels, CPU, dtype),
        'y': y.to(dtype),
        'y_bias': bias.to(dtype),
        **parameters(n, channels, CPU),
    }


def sublayer(n, dropout=0.0, seed=None, iterations=20):
    """read and write -> the sublayer input, the next streams."""

    def run(x, y, y_bias, weight, bias, alpha):
        u, carried = ops.read(
            *(x, weight, bias, alpha),
            num_streams=n,
            sinkhorn_iterations=iterations,
            backend='torch',
        )
        return u, ops.write(y, carried, y_bias, dropout=dropout, seed=seed, backend='torch')

    return run


def op_by_op(n, dropout, seed):
    def run(x, y, y_bias, weight, bias, alpha):
        pre, post, res = mapping_ref(x, weight, bias, alpha, num_streams=n)
        return pre_ref(x, pre), post_res_ref(x, y, post, res, y_bias, dropout, seed)

    return run


@pytest.mark.parametrize('n', [1, 3, 4])
def test_gradients_are_those_of_differences(n, random_seed):
    """Numerical differences know nothing of the backward that is written out; x has both uses."""
    tensors = {k: t.double() for k, t in tensors_of(n, 2, 2, torch.float64).items()}
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    # Few passes: the gradient of each is the same.
    run = sublayer(n, 0.3, seed_tensor(CPU), iterations=3)
    assert torch.autograd.gradcheck(lambda *given: run(*given), leaves, fast_mode=True)


# n, T, C: any n, of which the kernels have 1, 2, 4 and 8; one value a stream.
SHAPES = [(1, 5, 3), (2, 4, 1), (3, 7, 5), (4, 40, 37)] + [(n, 3, 5) for n in (5, 6, 7, 8, 16)]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_sublayer_against_fp64(shape, dtype, random_seed):
    n, *_ = shape
    tensors, mask = tensors_of(*shape, dtype), (0.2, seed_tensor(CPU))
    cotangents = cotangents_of(tensors['y'], tensors['x'])
    got, gradients = with_gradients(sublayer(n, *mask), tensors, cotangents)
    reference = op_by_op(n, *mask)
    want, truth = true_gradients(reference, tensors, cotangents)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and error(a, b) < TOLERANCE[dtype].streams + 1e-5
    of_bias = terms_of(reference, tensors, cotangents, ('bias',))['bias']
    sums = {'weight': of_bias, 'bias': of_bias, 'alpha': of_bias, 'y_bias': truth['y']}
    limit = TOLERANCE[dtype].gradients
    assert_gradients(gradients, truth, tensors, limit, sums=sums)


@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_sublayer_keeps_little(dtype, dropout):
    """The streams and y in their own dtype, and 2n^2 + 4n + 1 fp32 numbers of maps a token."""
    n, tokens, channels = 4, 6, 64
    tensors = tensors_of(n, tokens, channels, dtype)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sublayer(n, dropout)(**leaves)
    for name in ('weight', 'bias', 'alpha', 'y_bias'):
        kept.pop(leaves[name].untyped_storage().data_ptr(), None)
    maps = 4 * (2 * n * n + 4 * n + 1)
    seed = 8 if dropout else 0
    assert sum(kept.values()) <= tokens * ((n + 1) * channels * dtype.itemsize + maps) + seed


def test_a_sublayer_compiles_as_one_graph(random_seed):
    """Which gives what it gives without; no break, so that a compiled layer is one graph."""
    tensors = tensors_of(4, 6, 8, torch.float32)
    mask = 0.25, seed_tensor(CPU)
    eager = sublayer(4, *mask, iterations=3)
    torch._dynamo.reset()
    compiled = torch.compile(eager, backend='aot_eager', fullgraph=True, dynamic=False)
    cotangents = cotangents_of(tensors['y'], tensors['x'])
    want, truth = with_gradients(eager, tensors, cotangents)
    got, gradients = with_gradients(compiled, tensors, cotangents)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, gradient in truth.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
