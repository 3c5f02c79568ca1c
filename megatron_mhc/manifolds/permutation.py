"""Doubly stochastic matrices as mixtures of permutations (mHC-lite, arXiv 2601.05732)."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.sizes import permutations

# Of every permutation but the identity, under the identity preset: 0.99 on the diagonal at n = 4.
ELSEWHERE = -8.0


@functools.cache
def permutation_matrices(n: int, device: torch.device) -> Tensor:
    """All of them, ``[n!, n * n]`` fp64, the identity first."""
    # A tensor that inference made could not be used in training later.
    with torch.inference_mode(False):
        order = torch.tensor(list(itertools.permutations(range(n))), device=device)
        return torch.nn.functional.one_hot(order, n).flatten(1).double()


def mixture_of_permutations(logits: Tensor, n: int) -> Tensor:
    """``[..., n!]`` -> ``[..., n, n]``: permutation matrices, weighed by a softmax of the logits.

    By Birkhoff's theorem these are all the doubly stochastic matrices. Sums of rows and columns
    are exact to rounding, and no iteration is needed.
    """
    weights = logits.softmax(dim=-1)
    # In fp64, of which TF32 takes no digits away where a run allows it for matrix products.
    mixed = weights.double() @ permutation_matrices(n, logits.device)
    matrix: Tensor = mixed.to(logits.dtype).unflatten(-1, (n, n))
    return matrix


def bias_of_permutations(n: int, preset: str) -> Tensor:
    """0 for the identity, which is the first one, and 0 or less for the others."""
    bias = torch.zeros(permutations(n), device='cpu')
    if preset == 'identity':
        bias[1:] = ELSEWHERE
    return bias


class Permutation(Manifold):
    """n! logits: every doubly stochastic matrix, exactly; n up to 5."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._num_logits = permutations(n)

    @property
    def num_logits(self) -> int:
        return self._num_logits

    def matrix(self, logits: Tensor) -> Tensor:
        return mixture_of_permutations(logits, self.n)

    def bias(self, preset: str) -> Tensor:
        return bias_of_permutations(self.n, preset)
