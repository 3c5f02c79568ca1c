"""Command-line flags of the conditional memory, and from values to settings."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron_mhc.inputs.values import integer, number
from megatron_mhc.settings.engram import EngramConfig, flag
from megatron_mhc.settings.flags_residual import parsed_arguments
from megatron_mhc.settings.refused_engram import check_engram, check_stage, evenly_divided

FIELDS = tuple(field.name for field in dataclasses.fields(EngramConfig))


def add_engram_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``conditional memory`` group to ``parser`` and return it."""
    group = parser.add_argument_group(
        'conditional memory',
        'Engram (arXiv 2601.07372): layers read tables of hashed n-grams of token ids. With every '
        'residual type; without --engram-layers nothing changes.',
    )
    group.add_argument(
        '--engram-layers',
        type=integer(),
        nargs='+',
        metavar='N',
        help='decoder layers, counted from 1, before whose attention the memory is read (default: '
        'none; the paper uses 2 15 of 30)',
    )
    group.add_argument(
        '--engram-ngram-orders',
        type=integer(),
        nargs='+',
        metavar='N',
        help='lengths of the n-grams that end at a token (default: 2 3, the paper)',
    )
    group.add_argument(
        '--engram-heads',
        type=integer(),
        metavar='K',
        help='hash heads of each order, a table each (default: 8, the paper)',
    )
    group.add_argument(
        '--engram-table-size',
        type=integer(),
        metavar='ROWS',
        help='least rows of one table; each has a prime number of its own (default: 2262400, with '
        "which two layers hold 5.8e9 parameters, about the paper's 5.7e9)",
    )
    group.add_argument(
        '--engram-dim',
        type=integer(),
        metavar='D',
        help='width of what a token retrieves from all tables of a layer together, d_mem (default: '
        '1280, the paper)',
    )
    group.add_argument(
        '--engram-lr-mult',
        type=number(),
        metavar='F',
        help='factor on the learning rate of the tables, minimum included; they have Adam and no '
        'weight decay (default: 5, the paper)',
    )
    group.add_argument(
        '--engram-seed',
        type=integer(),
        metavar='SEED',
        help='of the hash and of the initial weights of the memory; apart from --seed, because a '
        'table means nothing under another hash (default: 0)',
    )
    return parser


def engram_config_from_args(args: argparse.Namespace) -> EngramConfig | None:
    """The settings that ``args`` describes; None without ``--engram-layers``.

    Raises:
        ValueError: a flag is out of range, or given without ``--engram-layers``.
    """
    given = {name: getattr(args, f'engram_{name}', None) for name in FIELDS}
    values = {name: value for name, value in given.items() if value is not None}
    if 'layers' not in values:
        for name in values:
            raise ValueError(
                f'{flag(name)} has no effect without --engram-layers: no layer has a memory; drop '
                'it or add --engram-layers'
            )
        return None
    for name in ('layers', 'ngram_orders'):
        if name in values:
            values[name] = tuple(values[name])
    return EngramConfig(**values)


def resolve_engram(args: argparse.Namespace) -> EngramConfig | None:
    """Check the settings and write them back to ``args`` with defaults filled in.

    Raises:
        ValueError: a value or a combination does not fit.
    """
    engram = engram_config_from_args(args)
    if engram is not None:
        check_engram(args, engram)
        first_stage_layers = evenly_divided(args)
        if first_stage_layers is not None:
            check_stage(engram, first_stage_layers)
        for name, value in dataclasses.asdict(engram).items():
            setattr(args, f'engram_{name}', list(value) if isinstance(value, tuple) else value)
    return engram


def engram_of(config: Any) -> EngramConfig | None:
    """``config.engram_config`` where a caller set it, else what the command line asked for."""
    engram = getattr(config, 'engram_config', None)
    if engram is None and (args := parsed_arguments()) is not None:
        engram = engram_config_from_args(args)
    return engram
