"""Seam: Megatron's argument parser. The only patch that a ``standard`` run sees.

It adds our flags, and hooks the parser so that everything wrong is said in one line as soon as the
values are known: before a process group, a model or a dataset exists. The other patches are applied
at that point, and only for a residual type that needs them.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable

from megatron_mhc.arguments import add_residual_arguments, resolve_arguments
from megatron_mhc.checkpoint import check_checkpoints_of
from megatron_mhc.constraints import check_constraints
from megatron_mhc.patches.engine import Patch, apply

OWN_FLAGS = ('--residual-type', '--mhc-', '--hc-')


def _wrap(original: Callable) -> Callable:
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args, **kwargs):
        parser = add_residual_arguments(original(parser, *args, **kwargs))
        parser.error = functools.partial(_error, parser, parser.error)
        parser.parse_known_args = functools.partial(_parse, parser, parser.parse_known_args)
        return parser

    return add_megatron_arguments


def _parse(parser: argparse.ArgumentParser, parse_known_args: Callable, *args, **kwargs):
    namespace, unknown = parse_known_args(*args, **kwargs)
    # A misspelt flag of ours must not pass where the script tolerates unknown ones.
    for token in unknown:
        if token.startswith(OWN_FLAGS):
            parser.error(f'argument {token}: no such flag; --help lists the residual connections')
    try:
        accept(namespace)
    except (ValueError, RuntimeError) as error:
        _exit(parser, str(error))
    return namespace, unknown


def accept(namespace: argparse.Namespace) -> None:
    """Validate the parsed flags and apply the patches that they need."""
    # Imported here: the patches import megatron.core, which --help does not need.
    from megatron_mhc.patches.registry import RESIDUAL_PATCHES

    residual = resolve_arguments(namespace)
    check_constraints(namespace, residual)
    check_checkpoints_of(namespace, residual)
    if residual.enabled:
        apply(RESIDUAL_PATCHES)


def _error(parser: argparse.ArgumentParser, original: Callable, message: str) -> None:
    """Megatron's usage text is hundreds of lines long; for our flags the one line is enough."""
    if message.startswith(tuple(f'argument {flag}' for flag in OWN_FLAGS)):
        _exit(parser, message)
    original(message)


def _exit(parser: argparse.ArgumentParser, message: str) -> None:
    first = os.environ.get('RANK', '0') == '0'
    parser.exit(2, f'{parser.prog}: error: {message}\n' if first else None)


ARGUMENTS_PATCH = Patch(
    id='arguments',
    target='megatron.training.arguments:add_megatron_arguments',
    wrap=_wrap,
    reason='parse_args looks this name up when it is called, so scripts keep their own providers',
    fingerprints=dict.fromkeys(('0.17', '0.18', '0.19'), '6904cd4c'),
)
