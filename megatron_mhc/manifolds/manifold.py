"""What a manifold has to say: how many logits it takes, and the matrix that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Manifold(ABC):
    """A set of n x n matrices, as a differentiable map onto it from unconstrained logits.

    An own one subclasses this, is named by an entry point of the group ``megatron_mhc.manifolds``
    and chosen by that name.

    Args:
        n: residual streams.

    Raises:
        ValueError: there is no such manifold for this n.
    """

    doubly_stochastic: bool = True
    """Whether rows and columns sum to 1 and nothing is negative; then the spectral norm is 1."""

    def __init__(self, n: int) -> None:
        self.n = n

    @property
    @abstractmethod
    def num_logits(self) -> int:
        """K, the logits of one matrix: so many rows of phi and entries of b belong to H_res."""

    @abstractmethod
    def matrix(self, logits: Tensor) -> Tensor:
        """H_res ``[..., n, n]`` of logits ``[..., K]``, both fp32 (fp64 stays fp64)."""

    @abstractmethod
    def bias(self, preset: str) -> Tensor:
        """Where training starts: ``[K]``, fp32, on the CPU.

        Args:
            preset: ``uniform``: H_res = 1/n, or I where that is not on the manifold. ``identity``:
                H_res near I, 0.95 or more on its diagonal.
        """
