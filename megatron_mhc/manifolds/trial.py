"""Try a manifold of another package before a run depends on it."""

from __future__ import annotations

import importlib.metadata

import torch

from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.sizes import INIT_PRESETS

# Row and column sums of a manifold that calls itself doubly stochastic, in fp32.
TOLERANCE = 1e-3


def tried(point: importlib.metadata.EntryPoint, n: int) -> Manifold:
    """What the entry point names, built for n streams.

    Raises:
        ValueError: it does not load, or does not do what ``Manifold`` says; names what and where.
    """
    where = f'entry point {point.value}'
    try:
        manifold: Manifold = point.load()(n)
        problem = problem_of(manifold)
    except Exception as error:  # anything may go wrong in code that is not ours
        raise ValueError(
            f'{where}: {type(error).__name__}: {error}; repair it, or use another manifold'
        ) from error
    if problem:
        raise ValueError(f'{where}, n = {n}: {problem}; see megatron_mhc.manifolds.manifold')
    return manifold


def problem_of(manifold: Manifold) -> str | None:
    """Half a sentence on what is wrong, from a few random matrices; None where all is well."""
    if not isinstance(manifold, Manifold):
        return f'got a {type(manifold).__name__}, wanted a subclass of Manifold'
    n, size = manifold.n, manifold.num_logits
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        return f'num_logits is {size!r}, wanted an integer >= 0'
    for preset in INIT_PRESETS:
        bias = manifold.bias(preset)
        if bias.shape != (size,) or not bias.isfinite().all():
            return f'bias({preset!r}) is {list(bias.shape)}, wanted {size} finite values'
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, size, generator=generator).requires_grad_()
    matrix = manifold.matrix(logits)
    if matrix.shape != (2, 3, n, n) or matrix.dtype != torch.float32:
        wanted = [2, 3, n, n]
        return f'matrix() gave {list(matrix.shape)} {matrix.dtype}, wanted {wanted} torch.float32'
    if not matrix.isfinite().all():
        return 'matrix() gave values that are not finite'
    if size:
        if not matrix.requires_grad:
            return 'matrix() cannot be differentiated'
        weights = torch.randn(matrix.shape, generator=generator)
        (gradient,) = torch.autograd.grad((matrix * weights).sum(), logits)
        if not gradient.isfinite().all():
            return 'the gradient of matrix() is not finite'
    if manifold.doubly_stochastic:
        sums = torch.cat([matrix.sum(-1), matrix.sum(-2)])
        if matrix.min() < 0 or (sums - 1).abs().max() > TOLERANCE:
            return 'doubly_stochastic is True, but rows or columns do not sum to 1'
    return None
