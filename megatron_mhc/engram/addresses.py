"""Where n-grams live: moduli, multipliers and rows, as exact integers and nothing else.

All follow from the settings alone, so that every rank, process and run has the same ones.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from typing import NamedTuple

from megatron_mhc.settings.engram import ROW_BLOCKS, EngramConfig

LARGEST = 2**63 - 1


class Addresses(NamedTuple):
    """How one layer finds its rows.

    Args:
        multipliers: one odd number for each token of the longest n-gram, the newest first.
        moduli: primes, all different, head after head within order after order.
        offsets: first row of each table in the layer's one matrix.
    """

    multipliers: tuple[int, ...]
    moduli: tuple[int, ...]
    offsets: tuple[int, ...]


def addresses(engram: EngramConfig, layer: int, vocabulary: int) -> Addresses:
    """The addresses of decoder layer ``layer`` (from 1) for token ids in 1 .. ``vocabulary``.

    A multiplier times the largest id stays within int64, so that products never wrap.
    """
    odd = (LARGEST // vocabulary + 1) // 2
    multipliers = []
    for position in range(engram.ngram_orders[-1]):
        # A digest, since no generator of random numbers promises the same ones for ever.
        digest = hashlib.sha256(f'engram {engram.seed} {layer} {position}'.encode()).digest()
        multipliers.append(2 * (int.from_bytes(digest) % odd) + 1)
    sizes = moduli(engram.table_size, engram.tables)
    return Addresses(tuple(multipliers), sizes, (0, *itertools.accumulate(sizes[:-1])))


def rows(engram: EngramConfig) -> int:
    """Rows of one layer's matrix: all its tables, padded."""
    used = sum(moduli(engram.table_size, engram.tables))
    return -(-used // ROW_BLOCKS) * ROW_BLOCKS


@functools.cache
def moduli(least: int, count: int) -> tuple[int, ...]:
    """The first ``count`` primes >= ``least``."""
    return tuple(itertools.islice(filter(_prime, itertools.count(least)), count))


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
