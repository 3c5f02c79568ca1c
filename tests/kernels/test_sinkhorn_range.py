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


def check(logits: torch.Tensor, passes: int, backend: str, limits: torch.Tensor | float) -> None:
    cotangent = torch.randn_like(logits)
    exact = logits.double().requires_grad_()
    want = truth(exact, passes)
    (want_gradient,) = torch.autograd.grad(want, exact, cotangent.double())
    got = ops.sinkhorn(logits.requires_grad_(), passes, backend=backend)
    (gradient,) = torch.autograd.grad(got, logits, cotangent)
    assert ((got - want).abs() < limits).all()
    # Terms of the gradient are as large as the cotangent, up to about 4.
    assert ((gradient - want_gradient).abs() < 4 * limits).all()


def of_every_size(tokens: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[4 tokens, n, n]`` of each standard deviation, and the limit of each."""
    sizes = torch.tensor(list(LIMITS))[:, None, None, None]
    limits = torch.tensor(list(LIMITS.values()))[:, None, None, None]
    logits = torch.randn(len(sizes), tokens, n, n) * sizes
    return logits.flatten(0, 1), limits.expand(-1, tokens, 1, 1).flatten(0, 1)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
def test_torch(random_seed, n):
    for passes in (*PASSES, 1000):
        logits, limits = of_every_size(100, n)
        check(logits, passes, 'torch', limits * (1 + passes // 1000))


@pytest.mark.parametrize('n', [1, 2, 4, 8])
def test_kernels(device, random_seed, n):
    for passes in PASSES:
        logits, limits = of_every_size(20, n)
        check(logits.to(device), passes, 'triton', limits.to(device))


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_what_underflows_grows_again(device, backend):
    """The large entries admit no permutation: e^-300 becomes 1/2, and its gradient is not lost."""
    logits = torch.tensor([[0.0, 0.0, -300.0, -300.0]] * 3 + [[0.0, 0.0, 0.0, -300.0]])
    # The interpreter takes 25 ms a pass.
    for passes in (20, 200, 600) if backend == 'torch' else (20, 200):
        check(logits.to(device)[None].clone(), passes, backend, 1e-4)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_the_largest_logits_are_finite(device, backend):
    logits = torch.tensor([[3e38, -3e38], [-3e38, 3e38]], device=device).requires_grad_()
    got = ops.sinkhorn(logits, 20, backend=backend)
    (gradient,) = torch.autograd.grad(got, logits, torch.randn_like(got))
    assert torch.equal(got, torch.eye(2, device=device)) and not gradient.any()
