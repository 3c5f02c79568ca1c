"""Doubly stochastic matrices as squares of rotations (go-mHC, arXiv 2604.02309, with s = 2)."""

from __future__ import annotations

import cmath
import itertools
import math

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.manifolds.orthogonal import Orthogonal
from megatron_mhc.manifolds.sizes import NUM_LOGITS, SQUARED_BLOCK

# Of every rotation under the identity preset, in all at most 0.04 off the diagonal: where angles
# are 0, squares have no gradient.
OFF_DIAGONAL = 0.04


class Orthostochastic(Manifold):
    """H[i, j] = |Q_ij|^2 / s, of the s x s blocks of a rotation Q of n s dimensions, s = 2.

    Rows and columns of Q have norm 1, so that those of H sum to 1: exact for any angles, without
    an iteration to stop. n (2n - 1) of them make all of SO(2n), as a product of plane rotations
    (the paper has a Cayley transform, which loses orthogonality where logits are large). Every
    unistochastic matrix, permutations and 1/n among them, is of this form with s = 2; larger s
    would fill more of the polytope.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.rotation = Orthogonal(SQUARED_BLOCK * n)

    @property
    def num_logits(self) -> int:
        return NUM_LOGITS['orthostochastic'](self.n)

    def matrix(self, logits: Tensor) -> Tensor:
        rotation = self.rotation.matrix(logits)
        blocks = rotation.unflatten(-2, (self.n, -1)).unflatten(-1, (self.n, -1))
        summed: Tensor = blocks.square().sum(dim=(-3, -1))
        return summed / SQUARED_BLOCK

    def bias(self, preset: str) -> Tensor:
        if preset == 'uniform':
            return angles_of(fourier(self.n)).float()
        # To second order each of the s (n - 1) rotations of a row into other blocks costs this.
        angle = math.sqrt(OFF_DIAGONAL / max(1, SQUARED_BLOCK * (self.n - 1)))
        return torch.full((self.num_logits,), angle, device='cpu')


def fourier(n: int) -> Tensor:
    """The unitary discrete Fourier transform as a rotation ``[2n, 2n]``, fp64: all |blocks|^2 are
    2/n.
    """
    rotation = torch.zeros(2 * n, 2 * n, dtype=torch.float64, device='cpu')
    for i, j in itertools.product(range(n), repeat=2):
        value = cmath.exp(-2j * cmath.pi * i * j / n) / math.sqrt(n)
        real, imaginary = value.real, value.imag
        block = torch.tensor([[real, -imaginary], [imaginary, real]], dtype=torch.float64)
        rotation[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block
    return rotation


def angles_of(rotation: Tensor) -> Tensor:
    """The logits of ``Orthogonal`` for a rotation: its transpose, brought to I one plane a time."""
    rest, angles = rotation.T.clone(), []
    for i, j in itertools.combinations(range(len(rotation)), 2):
        angle = math.atan2(-rest[j, i], rest[i, i])
        c, s = math.cos(angle), math.sin(angle)
        rest[i], rest[j] = c * rest[i] - s * rest[j], s * rest[i] + c * rest[j]
        angles.append(angle)
    return torch.tensor(angles, dtype=torch.float64, device='cpu')
