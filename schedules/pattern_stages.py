"""The stages of a hybrid layer pattern on the inverted V: a symbol a layer, ``|`` ends a stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from megatron_mhc.schedules.inverted_v import CHUNKS, balanced

_FLAG = '--hybrid-layer-pattern'


def stages_of(main: str, ranks: int) -> list[str]:
    """The layers of each stage of ``main``, a pattern without prediction layers, first to last.

    Raises:
        ValueError: they are not the 2 P stages of a V on ``ranks`` pipeline ranks.
    """
    stages, wanted = main.split('|'), CHUNKS * ranks
    if len(stages) != wanted:
        layers = main.replace('|', '')
        found = f'{len(layers)} layers do not divide into the {wanted} stages of a V'
        if len(stages) > 1:
            found = f'{len(stages)} stages, but a V has {wanted}'
        raise ValueError(
            f'{_FLAG} {main}: {found} on {ranks} pipeline ranks; separate them by |, for example '
            f"'{_divided(layers, ranks)}'"
        )
    return stages


def cut_pattern(pattern: str, ranks: int) -> str:
    """``pattern`` with its 2 P stages in it; where it has none, they get as many layers each.

    Raises:
        ValueError: it has another number of stages, or its layers do not divide.
    """
    main, slash, predicted = pattern.partition('/')
    even = '|' not in main and len(main) and len(main) % (CHUNKS * ranks) == 0
    stages = _divided(main, ranks) if even else '|'.join(stages_of(main, ranks))
    return stages + slash + predicted


def _divided(layers: str, ranks: int) -> str:
    return in_stages(layers, balanced(len(layers), ranks))


def in_stages(layers: str, counts: Iterable[int]) -> str:
    """``layers`` with ``|`` between stages of so many of them."""
    symbols = iter(layers)
    return '|'.join(''.join(itertools.islice(symbols, count)) for count in counts)
