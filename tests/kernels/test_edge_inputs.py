"""No tokens, no values (the meta device), strided streams, and streams too large to square."""

import pytest
import torch

from megatron_mhc import ops

N, C = 4, 16
SHAPES = {'weight': (24, N * C), 'bias': (24,), 'alpha': (3,), 'y_bias': (C,)}


def leaves(tokens: int, device) -> dict[str, torch.Tensor]:
    shapes = {'x': (tokens, 2, N * C), 'y': (tokens, 2, C), **SHAPES}
    return {
        name: torch.randn(shape, device=device, requires_grad=True)
        for name, shape in shapes.items()
    }


def sublayers(x, y, weight, bias, alpha, y_bias, backend) -> list[torch.Tensor]:
    """Every op: mapping, pre, post_res and Sinkhorn by themselves, and read, write_read, write."""
    options = {'num_streams': N, 'backend': backend}
    h_pre, h_post, h_res = ops.mapping(x, weight, bias, alpha, **options)
    u = ops.pre(x, h_pre, backend=backend)
    apart = ops.post_res(x, y, h_post, h_res, y_bias, backend=backend)
    first, carried = ops.read(x, weight, bias, alpha, **options)
    between, second, carried = ops.write_read(
        y, carried, weight, bias, alpha, y_bias=y_bias, **options
    )
    last = ops.write(y, carried, y_bias, dropout=0.5, backend=backend)
    return [u, apart, first, between, second, last, ops.sinkhorn(h_res, backend=backend)]


def outputs_and_gradients(given: dict, backend: str) -> list[torch.Tensor]:
    outputs = sublayers(**given, backend=backend)
    gradients = torch.autograd.grad(sum(out.sum() for out in outputs), list(given.values()))
    return [*outputs, *gradients]


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_no_tokens(device, backend):
    """An empty shard of a pipeline or of experts: shapes, and gradients of zero for parameters."""
    given = leaves(0, device)
    want = [tensor.shape for tensor in outputs_and_gradients(leaves(1, device), 'torch')]
    found = outputs_and_gradients(given, backend)
    assert [tensor.shape[1:] for tensor in found[:-4]] == [shape[1:] for shape in want[:-4]]
    assert all(tensor.shape[0] == 0 for tensor in found[:-4])
    for name, gradient in zip(SHAPES, found[-4:], strict=True):
        assert gradient.shape == SHAPES[name] and not gradient.any(), name


@pytest.mark.parametrize('backend', ['torch', 'auto'])
@pytest.mark.parametrize('tokens', [0, 3])
def test_the_meta_device_has_shapes(backend, tokens):
    found = outputs_and_gradients(leaves(tokens, 'meta'), backend)
    want = outputs_and_gradients(leaves(tokens, 'cpu'), 'torch')
    assert [t.shape for t in found] == [t.shape for t in want]
    assert all(t.device.type == 'meta' for t in found)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize('view', ['last axis', 'batch first', 'every other token'])
def test_strided_streams_have_the_bits_of_their_copy(device, random_seed, backend, view):
    given = leaves(10, device)
    want = outputs_and_gradients(given, backend)
    x = given['x'].detach()
    if view == 'last axis':
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif view == 'batch first':
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=1).flatten(0, 1)[::2]
    assert not x.is_contiguous()
    torch.manual_seed(random_seed)
    strided = outputs_and_gradients(given | {'x': x.requires_grad_()}, backend)
    for number, (a, b) in enumerate(zip(want, strided, strict=True)):
        # The sixth has a random mask.
        assert number == 5 or number > 6 or torch.equal(a, b), number


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize('size', [1e20, 1e30, torch.inf, torch.nan])
def test_a_norm_beyond_fp32_is_seen(device, backend, size):
    """It must not pass for maps of the biases alone, in the maps as in the gradients."""
    given = leaves(3, device)
    with torch.no_grad():
        given['x'][1, 0] = given['x'][1, 0].sign() * size
        # As far as it is said to hold.
        width = given['x'].shape[-1]
        given['x'][2, 0] = given['x'][2, 0].sign() * 1.8e19 / width**0.5
    parameters = [given[name] for name in ('weight', 'bias', 'alpha')]
    maps = ops.mapping(given['x'], *parameters, num_streams=N, backend=backend)
    for h in maps:
        assert h[1, 0].isnan().all() and h[0].isfinite().all() and h[2].isfinite().all()
    gradients = torch.autograd.grad(sum(h.sum() for h in maps), parameters)
    assert all(gradient.isnan().any() for gradient in gradients)
