"""The settings of the conditional memory, checked value by value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# Taps of the depthwise causal convolution; their distance is the longest n-gram.
CONVOLUTION_WIDTH = 4


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
        for name, least, remedy in (
            ('layers', 1, 'layers count from 1; the paper uses 2 15'),
            ('ngram_orders', 2, 'a bigram has order 2; the paper uses 2 3'),
        ):
            given = getattr(self, name)
            values = tuple(sorted(set(given)))
            if not values or len(values) != len(given) or not _integers(values, least):
                raise ValueError(
                    f'{flag(name)} {" ".join(map(str, given))}: wanted different integers >= '
                    f'{least}; {remedy}'
                )
            object.__setattr__(self, name, values)
        for name, least, paper in (
            ('heads', 1, 8),
            ('table_size', 2, 2_262_400),
            ('dim', 1, 1280),
            ('seed', 0, 0),
        ):
            if not _integers((getattr(self, name),), least):
                raise ValueError(
                    f'{flag(name)} {getattr(self, name)}: wanted an integer >= {least}; the '
                    f'default is {paper}'
                )
        if not 0 <= self.lr_mult < float('inf'):
            raise ValueError(
                f'{flag("lr_mult")} {self.lr_mult}: wanted a finite number >= 0 (it multiplies the '
                'learning rate of the tables); the paper uses 5'
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
    return '--engram-' + name.replace('_', '-')


def _integers(values: tuple, least: int) -> bool:
    return all(type(value) is int and value >= least for value in values)
