"""The conditional memory of a command line: from a namespace to settings and back."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.flag import flags_of, given, write_back
from megatron_mhc.settings.flags_residual import parsed_arguments
from megatron_mhc.settings.refused_engram import check_engram


def engram_config_from_args(args: argparse.Namespace) -> EngramConfig | None:
    """The settings that ``args`` describes; None without ``--engram-layers``.

    Raises:
        ValueError: a flag is out of range, or given without ``--engram-layers``.
    """
    values = given(args, EngramConfig)
    if values and 'layers' not in values:
        raise ValueError(
            f'{flags_of(EngramConfig)[next(iter(values))].name} has no effect without '
            '--engram-layers: no layer has a memory; drop it or add --engram-layers'
        )
    return EngramConfig(**values) if values else None


def resolve_engram(args: argparse.Namespace) -> EngramConfig | None:
    """Check the settings and write them back to ``args`` with defaults filled in.

    Raises:
        ValueError: a value or a combination does not fit.
    """
    engram = engram_config_from_args(args)
    if engram is not None:
        check_engram(args, engram)
        write_back(args, engram)
    return engram


def engram_of(config: Any) -> EngramConfig | None:
    """``config.engram_config`` where a caller set it, else what the command line asked for."""
    engram = getattr(config, 'engram_config', None)
    if engram is None and (args := parsed_arguments()) is not None:
        engram = engram_config_from_args(args)
    return engram
