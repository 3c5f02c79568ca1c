"""Sinkhorn-Knopp, forward and backward, against fp64 autograd of the unrolled passes."""

import pytest
import torch
from truth import SINKHORN_GRADIENT, TOLERANCE, cotangents_of, error, true_gradients, with_gradients

from megatron_mhc import ops
from megatron_mhc.kernels.reference import sinkhorn_ref

MAPS = TOLERANCE[torch.float32].maps
# Tokens beyond one tile, and a last one that is not full.
TOKENS = {1: 130, 2: 133, 4: 71, 8: 19}


def both(logits: torch.Tensor, iterations: int):
    """Kernels and truth, each H_res and the gradient of the logits."""
    cotangents = cotangents_of(logits)
    (res,), gradients = with_gradients(
        lambda logits: ops.sinkhorn(logits, iterations, backend='triton'),
        {'logits': logits},
        cotangents,
    )
    (true_res,), truth = true_gradients(
        lambda logits: sinkhorn_ref(logits, iterations), {'logits': logits}, cotangents
    )
    return (res, gradients['logits']), (true_res, truth['logits'])


@pytest.mark.parametrize('n', TOKENS)
@pytest.mark.parametrize('iterations', [1, 2, 3, 7, 20])
def test_forward_and_gradient(n, iterations, device, random_seed):
    got, want = both(2 * torch.randn(TOKENS[n], n, n).to(device), iterations)
    assert got[0].dtype == torch.float32
    assert error(got[0], want[0]) < MAPS / 10
    assert (got[0].sum(-1) - 1).abs().max() < 1e-6
    assert error(got[1], want[1]) < SINKHORN_GRADIENT


@pytest.mark.parametrize('n', [2, 4, 8])
@pytest.mark.parametrize('spread', [0.0, 30.0, 300.0, 1e4])
def test_extreme_logits(n, spread, device, random_seed):
    """Equal logits, and logits of which exp overflows, or underflows in whole rows."""
    got, want = both(spread * torch.randn(9, n, n).to(device), 20)
    assert (got[0] >= 0).all() and (got[0].sum(-1) - 1).abs().max() < 1e-6
    # fp32 logits of 1e4 have 1e-3 in their last place, and so have their differences.
    assert (got[0] - want[0]).abs().max() < 1e-5 * max(spread, 1)
    assert got[1].isfinite().all()
    assert (got[1] - want[1]).abs().max() < 1e-5 * max(spread, 1)


def test_one_entry_may_be_forbidden(device):
    logits = torch.zeros(1, 4, 4, device=device)
    logits[0, 0, 3] = float('-inf')
    res = ops.sinkhorn(logits, backend='triton')
    assert res[0, 0, 3] == 0 and error(res, sinkhorn_ref(logits.double())) < MAPS


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_logits_stay_in_their_token(value, device):
    logits = torch.zeros(5, 4, 4, device=device)
    logits[2, 1, 3] = value
    leaf = logits.clone().requires_grad_()
    res = ops.sinkhorn(leaf, backend='triton')
    res.square().sum().backward()
    others = [0, 1, 3, 4]
    for tensor in (res, leaf.grad):
        assert not tensor[2].isfinite().all()
        assert tensor[others].isfinite().all()
    torch.testing.assert_close(res[others], torch.full((4, 4, 4), 0.25, device=device))


def test_leading_dimensions_and_strides(device, random_seed):
    logits = torch.randn(4, 3, 4, 2, device=device).movedim(0, -1)
    assert not logits.is_contiguous()
    res = ops.sinkhorn(logits.transpose(-1, -2)[..., :2, :], 5, backend='triton')
    want = sinkhorn_ref(logits.transpose(-1, -2)[..., :2, :].double(), 5)
    assert res.shape == want.shape and error(res, want) < MAPS
