"""Doubly stochastic matrices as Kronecker products of small ones (KromHC, arXiv 2601.21579)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.permutation import bias_of_permutations, mixture_of_permutations
from megatron_mhc.manifolds.sizes import factor_permutations, permutations, prime_factors


class Kronecker(Manifold):
    """One mixture of permutations for each prime factor of n: 4 logits at n = 4, 6 at n = 8.

    A Kronecker product of doubly stochastic matrices is doubly stochastic. Far fewer parameters
    than the whole polytope has dimensions, and not all of it; for prime n it is ``permutation``.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._num_logits = factor_permutations(n)
        self.factors = prime_factors(n)

    @property
    def num_logits(self) -> int:
        return self._num_logits

    def matrix(self, logits: Tensor) -> Tensor:
        product = logits.new_ones(*logits.shape[:-1], 1, 1)
        parts = logits.split([permutations(size) for size in self.factors], dim=-1)
        for size, part in zip(self.factors, parts, strict=True):
            factor = mixture_of_permutations(part, size)
            # [..., a, 1, b, 1] * [..., 1, c, 1, d] -> [..., a c, b d]
            product = product[..., :, None, :, None] * factor[..., None, :, None, :]
            product = product.flatten(-2).flatten(-3, -2)
        return product

    def bias(self, preset: str) -> Tensor:
        parts = [bias_of_permutations(size, preset) for size in self.factors]
        return torch.cat([torch.zeros(0, device='cpu'), *parts])
