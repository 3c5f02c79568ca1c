"""The residual topology of a command line: from a namespace to settings and back.

Every flag is None where it is left out, so that one given in vain (``--mhc-...`` under
``standard``) is noticed; ``resolve_arguments`` then fills in the papers' values.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Container, Iterable

from megatron_mhc.settings.flag import flags_of, given, refuse_in_vain, structure, write_back
from megatron_mhc.settings.residual import PAPER_NORM_EPS, ResidualConfig


def parsed_arguments() -> argparse.Namespace | None:
    """Megatron's global arguments; None before they are parsed, or where only core is in use.

    The training package is not imported for it: a caller of ``megatron.core`` has no use for it.
    """
    return getattr(sys.modules.get('megatron.training.global_vars'), '_GLOBAL_ARGS', None)


def residual_config_from_args(args: argparse.Namespace) -> ResidualConfig:
    """The settings that ``args`` describes; ``standard`` where the flags are absent.

    Raises:
        ValueError: a flag is out of range, or does not apply to the chosen residual type.
    """
    residual_type = getattr(args, 'residual_type', 'standard')
    values = {}
    # Without streams a release may have flags of these names for itself.
    if residual_type != 'standard':
        values = given(args, ResidualConfig)
        _refuse_in_vain(values, residual_type)
    if getattr(args, 'seed', None) is not None:
        values['seed'] = args.seed
    return ResidualConfig(**{**values, 'residual_type': residual_type})


def _refuse_in_vain(names: Iterable[str], residual_type: str) -> None:
    flags = flags_of(ResidualConfig)
    given_flags = [flags[name] for name in names]
    refuse_in_vain(given_flags, 'residual_type', flags['residual_type'].name, residual_type)


def saved_residual_config(args: argparse.Namespace) -> ResidualConfig:
    """The settings with which a checkpoint that has these ``args`` was trained.

    One from before ``--mhc-norm-eps`` was trained with the paper's.
    """
    if getattr(args, 'mhc_norm_eps', None) is None:
        plain = residual_config_from_args(args)
        if plain.takes_norm_eps:
            return dataclasses.replace(plain, norm_eps=PAPER_NORM_EPS)
    return residual_config_from_args(args)


def resolve_arguments(args: argparse.Namespace, shared: Container[str] = ()) -> ResidualConfig:
    """Write the settings back to ``args`` with defaults filled in, as plain values.

    Megatron saves the namespace with every checkpoint and prints it, so both then tell what ran.

    Args:
        shared: arguments that belong to the Megatron release without streams of ours.
    """
    if args.residual_type == 'standard':
        own = flags_of(ResidualConfig)
        names = [name for name in given(args, ResidualConfig) if own[name].dest not in shared]
        _refuse_in_vain(names, 'standard')
    residual = residual_config_from_args(args)
    kind = residual.residual_type
    write_back(args, residual, lambda flag: kind in flag.only.get('residual_type', (kind,)))
    return residual


def same_structure(a: ResidualConfig, b: ResidualConfig) -> bool:
    """Whether weights trained under ``a`` compute the same function under ``b``."""
    return structure(a) == structure(b)
