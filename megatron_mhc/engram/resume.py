"""Refuse a checkpoint whose memory differs from the run's, before a model is built.

Stock Megatron would drop a memory that the run does not ask for without a word, and a table means
nothing under another hash.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_mhc.checkpoints.check import Found, loads_optimizer
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.flags_engram import engram_config_from_args


def check_memory(
    args: argparse.Namespace, engram: EngramConfig | None, checkpoints: list[Found]
) -> None:
    """Raise ValueError where a checkpoint that Megatron will load has another memory, or none."""
    for found in checkpoints:
        if found.args is None:
            continue
        source, stored = found.source, engram_config_from_args(found.args)
        if _structure(stored) != _structure(engram):
            raise ValueError(
                f'--load {source}: the checkpoint was trained with the memory [{_shown(stored)}] '
                f'but this run asks for [{_shown(engram)}]; repeat its --engram flags, or leave '
                'out --load to train from scratch'
            )
        if engram is None or stored is None or not (args.load and loads_optimizer(args)):
            continue
        if stored.lr_mult != engram.lr_mult:
            raise ValueError(
                f'--engram-lr-mult {engram.lr_mult}: the optimizer state in --load {source} was '
                f'saved with {stored.lr_mult}, and Megatron finds parameter groups by their '
                'settings; repeat it, or start with a new optimizer: --no-load-optim'
            )


def _structure(engram: EngramConfig | None) -> tuple[Any, ...] | None:
    return None if engram is None else engram.structure()


def _shown(engram: EngramConfig | None) -> str:
    return 'none' if engram is None else engram.describe()
