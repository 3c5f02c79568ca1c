"""How many logits each manifold takes: plain arithmetic that needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable

# How H_res may start; ``--mhc-init`` says this and more.
INIT_PRESETS = ('uniform', 'identity')

# 5! = 120 rows of phi; 6! would be 720 for 25 degrees of freedom.
LARGEST_PERMUTED = 5
# s of orthostochastic matrices: rows, and columns, of the blocks whose squares are summed.
SQUARED_BLOCK = 2


def permutations(n: int) -> int:
    """n!, the vertices of the Birkhoff polytope; raises ValueError where these are too many."""
    if n > LARGEST_PERMUTED:
        raise ValueError(
            f'{n}! = {math.factorial(n)} permutations of {n} streams are too many; use at most '
            f'{LARGEST_PERMUTED} streams, or --mhc-manifold kronecker or sinkhorn'
        )
    return math.factorial(n)


def prime_factors(n: int) -> tuple[int, ...]:
    """The sizes of the Kronecker factors of n streams, ascending; none for one stream."""
    found, rest = [], n
    for prime in range(2, n + 1):
        while rest % prime == 0:
            found.append(prime)
            rest //= prime
    return tuple(found)


def factor_permutations(n: int) -> int:
    """Permutations of all Kronecker factors; raises ValueError where a factor is too large."""
    factors = prime_factors(n)
    if factors and factors[-1] > LARGEST_PERMUTED:
        raise ValueError(
            f'{n} streams have a factor of {factors[-1]}, whose permutations are too many; use a '
            'number of streams without prime factors above 5, or --mhc-manifold sinkhorn'
        )
    return sum(map(permutations, factors))


def _planes(dimensions: int) -> int:
    return dimensions * (dimensions - 1) // 2


NUM_LOGITS: dict[str, Callable[[int], int]] = {
    'sinkhorn': lambda n: n * n,
    'permutation': permutations,
    'kronecker': factor_permutations,
    'orthostochastic': lambda n: _planes(SQUARED_BLOCK * n),
    'orthogonal': lambda n: _planes(n),
    'diagonal': lambda n: n,
    'identity': lambda n: 0,
}


def matrix_flops(name: str, n: int, sinkhorn_iterations: int) -> int:
    """Operations from logits to H_res of one token; 0 for manifolds that are not ours.

    ::

        sinkhorn      4 t n^2                 t column and row passes: sums and divisions
        permutation   3 n! + 2 n! n^2         softmax, sum over the permutations
        kronecker     the same of each factor, and the products
        orthostochastic  as orthogonal of 2n, and 8 n^2 for the squares
        orthogonal    6 n per rotation        n (n - 1) / 2 rotations of two rows
        diagonal      3 n                     sigmoids
    """
    if name == 'sinkhorn':
        return 4 * sinkhorn_iterations * n * n
    if name == 'permutation':
        return permutations(n) * (3 + 2 * n * n)
    if name == 'kronecker':
        factors, size, flops = prime_factors(n), 1, 0
        for factor in factors:
            size *= factor
            flops += permutations(factor) * (3 + 2 * factor * factor) + size * size
        return flops
    if name == 'orthostochastic':
        wide = SQUARED_BLOCK * n
        return 6 * wide * NUM_LOGITS[name](n) + 2 * wide * wide
    of_one_logit = {'orthogonal': 6 * n, 'diagonal': 3}
    return of_one_logit[name] * NUM_LOGITS[name](n) if name in of_one_logit else 0
