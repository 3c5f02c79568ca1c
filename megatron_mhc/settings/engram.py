"""The settings of the conditional memory, checked value by value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_mhc.inputs.values import (
    MOST_FACTOR,
    MOST_LAYERS,
    MOST_WIDTH,
    check_integer,
    check_number,
    flag_of,
    shown,
)

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

    Args:
        layers: decoder layers, counted from 1, before whose attention the memory is read (paper: 2
            and 15 of 30).
        ngram_orders: lengths of the suffix n-grams (paper: 2, 3).
        heads: hash heads K of each order (paper: 8).
        table_size: least rows of a head's table; each has the next prime of its own. The default
            gives two layers 5.8e9 parameters, as Engram-27B has 5.7e9.
        dim: d_mem, width of all retrieved vectors together (paper: 1280).
        lr_mult: factor >= 0 on the learning rate of the tables (paper: 5).
        seed: of the hash multipliers and of the initial weights.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    layers: tuple[int, ...]
    ngram_orders: tuple[int, ...] = (2, 3)
    heads: int = 8
    table_size: int = 2_262_400
    dim: int = 1280
    lr_mult: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most, remedy in (
            ('layers', 1, MOST_LAYERS, 'layers count from 1; the paper uses 2 15'),
            ('ngram_orders', 2, MOST_ORDER, 'a bigram has order 2; the paper uses 2 3'),
        ):
            given = getattr(self, name)
            listed = isinstance(given, tuple | list)
            whole = listed and all(type(v) is int and least <= v <= most for v in given)
            if not whole or not given or len(set(given)) != len(given):
                words = ' '.join(map(shown, given)) if listed else shown(given)
                raise ValueError(
                    f'{flag(name)} {words}: wanted different integers from {least} to {most}; '
                    f'{remedy}'
                )
            object.__setattr__(self, name, tuple(sorted(given)))
        for name, least, most in (
            ('heads', 1, MOST_HEADS),
            ('table_size', 2, MOST_ROWS),
            ('dim', 1, MOST_WIDTH),
            ('seed', 0, MOST_SEED),
        ):
            default = type(self).__dataclass_fields__[name].default
            check_integer(flag(name), getattr(self, name), least, most, f'the default is {default}')
        check_number(
            *(flag('lr_mult'), self.lr_mult, 0, MOST_FACTOR),
            'it multiplies the learning rate of the tables, and the paper uses 5',
        )
        if self.dim % self.tables:
            raise ValueError(
                f'{flag("dim")} {self.dim}: not a multiple of {len(self.ngram_orders)} orders x '
                f'{self.heads} heads = {self.tables} tables, which share it; use '
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

    def structure(self) -> tuple:
        """What has to be equal for weights to mean the same."""
        values = dataclasses.asdict(self)
        values.pop('lr_mult')
        return tuple(values.items())

    def describe(self) -> str:
        """One line for error messages."""
        return ' '.join(f'{name}={value}' for name, value in dataclasses.asdict(self).items())


def flag(name: str) -> str:
    """The command line's name of a field."""
    return flag_of(f'engram_{name}')
