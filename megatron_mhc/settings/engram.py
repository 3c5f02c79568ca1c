"""The settings of the conditional memory, checked value by value."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any

from megatron_mhc.inputs.values import MOST_FACTOR, MOST_LAYERS, MOST_WIDTH
from megatron_mhc.settings.flag import check, setting, structure

# A hash takes the orders one by one, and rows are numbered by 32 bits.
MOST_ORDER, MOST_HEADS, MOST_ROWS, MOST_SEED = 64, 1024, 2**31 - 1, 2**63 - 1
# Taps of the depthwise causal convolution; their distance is the longest n-gram.
CONVOLUTION_WIDTH = 4
# Rows of a layer are padded to a multiple of it: their number must not depend on the ranks that
# share them, and this one is divided by every usual number of ranks.
ROW_BLOCKS = 768


@dataclass(frozen=True)
class EngramConfig:
    """Conditional memory of a model. Plain values only, so that it can be saved.

    Each field says what it is through its flag; megatron_mhc/docs/flags.md has them as a table.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    layers: tuple[int, ...] = setting(
        MISSING,
        '--engram-layers',
        int,
        many=True,
        least=1,
        most=MOST_LAYERS,
        why='layers count from 1; the paper uses 2 15 of 30',
        structural=True,
        metavar='N',
        help='decoder layers, counted from 1, that read the memory before their attention',
        more='the paper uses 2 15 of 30; in a hybrid pattern each symbol is a layer',
    )
    ngram_orders: tuple[int, ...] = setting(
        (2, 3),
        '--engram-ngram-orders',
        int,
        many=True,
        least=2,
        most=MOST_ORDER,
        why='a bigram has order 2',
        structural=True,
        metavar='N',
        help='lengths of the n-grams that end at a token',
        source='the paper',
    )
    heads: int = setting(
        8,
        '--engram-heads',
        int,
        least=1,
        most=MOST_HEADS,
        structural=True,
        metavar='K',
        help='hash heads of each order, with one table each',
        source='the paper',
    )
    table_size: int = setting(
        2_262_400,
        '--engram-table-size',
        int,
        least=2,
        most=MOST_ROWS,
        structural=True,
        metavar='ROWS',
        help='minimum rows of one table; each has a prime number of its own',
        more="the default gives two layers 5.8e9 parameters, about the paper's 5.7e9",
    )
    dim: int = setting(
        1280,
        '--engram-dim',
        int,
        least=1,
        most=MOST_WIDTH,
        structural=True,
        metavar='D',
        help='width of what a token retrieves from all tables of a layer together, d_mem',
        source='the paper',
    )
    lr_mult: float = setting(
        5.0,
        '--engram-lr-mult',
        float,
        most=MOST_FACTOR,
        why='it multiplies the learning rate of the tables',
        metavar='F',
        help='factor on the learning rate of the tables, including its minimum; they never decay',
        more='the tables use Adam',
        source='the paper',
    )
    seed: int = setting(
        0,
        '--engram-seed',
        int,
        most=MOST_SEED,
        structural=True,
        metavar='SEED',
        help='seed of the hash and of the initial weights of the memory',
        more='separate from --seed, because a table means nothing under another hash',
    )

    def __post_init__(self) -> None:
        check(self)
        if self.dim % self.tables:
            raise ValueError(
                f'--engram-dim {self.dim}: not a multiple of the {len(self.ngram_orders)} orders x '
                f'{self.heads} heads = {self.tables} tables that share it; use '
                f'{-(-self.dim // self.tables) * self.tables}'
            )

    @property
    def tables(self) -> int:
        """Tables of a layer: one for each order and head."""
        return len(self.ngram_orders) * self.heads

    @property
    def row_width(self) -> int:
        """Width of one row of a table."""
        return self.dim // self.tables

    @property
    def dilation(self) -> int:
        """Tokens between two taps of the convolution."""
        return self.ngram_orders[-1]

    @property
    def reach(self) -> int:
        """Tokens before its own that the convolution reads."""
        return (CONVOLUTION_WIDTH - 1) * self.dilation

    def edge_values(self, value_bytes: int) -> int:
        """Values a token, of ``value_bytes`` each, between pipeline stages beside the streams.

        Its id and its place, as numbers of fp32: as themselves, or each as three of 16 bits.
        """
        return 2 * (3 if value_bytes == 2 else 1)

    def structure(self) -> tuple[tuple[str, Any], ...]:
        """What has to be equal for weights to mean the same."""
        return structure(self)

    def describe(self) -> str:
        """One line for error messages."""
        return ' '.join(f'{name}={value}' for name, value in dataclasses.asdict(self).items())
