"""Sinkhorn for any number of passes and any finite logits, against fp64 in log space."""

import pytest
import torch

from megatron_mhc import ops

# Standard deviation of the logits -> error of an entry, of what fp32 logits of that size allow.
LIMITS = {1.0: 1e-6, 3.0: 1e-6, 50.0: 1e-4, 1000.0: 2e-3}
# 19 passes go without a logarithm; the numbers around, and some whose parts are uneven.
PASSES = (1, 2, 3, 5, 20, 21, 22, 39, 40, 100)


def truth(logits: torch.Tensor, passes: int) -> torch.Tensor:
    """Columns first, rows last; exp and log alone, in fp64."""
    logs = logits.double()
    for _ in range(passes):
        for axis in (-2, -1):
            peak = logs.amax(axis, keepdim=True)
            logs = logs - (peak + (logs - peak).exp().sum(axis, keepdim=True).log())
    return logs.exp()


def check(logits: torch.Tensor, passes: int, backend: str, limit: float) -> None:
    cotangent = torch.randn_like(logits)
    exact = logits.double().requires_grad_()
    want = truth(exact, passes)
    (want_gradient,) = torch.autograd.grad(want, exact, cotangent.double())
    got = ops.sinkhorn(logits.requires_grad_(), passes, backend=backend)
    (gradient,) = torch.autograd.grad(got, logits, cotangent)
    assert (got - want).abs().max() < limit
    # Terms of the gradient are as large as the cotangent, up to about 4.
    assert (gradient - want_gradient).abs().max() < 4 * limit


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
@pytest.mark.parametrize('std', LIMITS)
def test_torch(random_seed, n, std):
    for passes in (*PASSES, 1000):
        check(torch.randn(300, n, n) * std, passes, 'torch', LIMITS[std] * (1 + passes // 1000))


@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('std', LIMITS)
def test_kernels(device, random_seed, n, std):
    for passes in PASSES:
        check(torch.randn(20, n, n, device=device) * std, passes, 'triton', LIMITS[std])


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_what_underflows_grows_again(device, backend):
    """The large entries admit no permutation: e^-300 becomes 1/2, and its gradient is not lost."""
    logits = torch.tensor([[0.0, 0.0, -300.0, -300.0]] * 3 + [[0.0, 0.0, 0.0, -300.0]])
    for passes in (20, 200, 600):
        check(logits.to(device)[None].clone(), passes, backend, 1e-4)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_the_largest_logits_are_finite(device, backend):
    logits = torch.tensor([[3e38, -3e38], [-3e38, 3e38]], device=device).requires_grad_()
    got = ops.sinkhorn(logits, 20, backend=backend)
    (gradient,) = torch.autograd.grad(got, logits, torch.randn_like(got))
    assert torch.equal(got, torch.eye(2, device=device)) and not gradient.any()
