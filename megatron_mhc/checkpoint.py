"""Refuse a checkpoint whose residual topology differs from the run's, before a model is built.

Stock Megatron loads a hyper-connection checkpoint into a standard model without a word: extra keys
are ignored. The arguments saved in every checkpoint tell which topology it has.
"""

from __future__ import annotations

import argparse
import pathlib

import torch

from megatron_mhc.arguments import residual_config_from_args, same_structure
from megatron_mhc.config import ResidualConfig

TRACKER = 'latest_checkpointed_iteration.txt'


def checkpoint_arguments(directory: str, step: int | None = None) -> argparse.Namespace | None:
    """The arguments saved with a checkpoint of any format; None where there is nothing to read.

    Args:
        directory: what ``--load`` names: a folder with a tracker file.
        step: ``--ckpt-step``, an iteration other than the tracker's.
    """
    root = pathlib.Path(directory)
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    written = tracker.read_text().strip()
    folder = 'release' if written == 'release' and step is None else f'iter_{step or written:0>7}'
    if (root / folder / 'metadata.json').is_file():
        from megatron.core.dist_checkpointing import load_common_state_dict

        return load_common_state_dict(str(root / folder)).get('args')
    # One file per rank: mapped, so that only the arguments are read. It is a pickle, as it is for
    # Megatron, which loads it whole a moment later.
    for file in sorted((root / folder).glob('mp_rank_00*/model_optim_rng.pt')):
        state = torch.load(file, map_location='cpu', mmap=True, weights_only=False)
        return state.get('args')
    return None


def check_checkpoint(saved: argparse.Namespace, residual: ResidualConfig, source: str) -> None:
    """Raise ValueError unless weights saved with ``saved`` fit a model built with ``residual``."""
    stored = residual_config_from_args(saved)
    if not same_structure(stored, residual):
        raise ValueError(
            f'--load {source}: the checkpoint was trained with residual connections '
            f'[{stored.describe()}] but this run asks for [{residual.describe()}]; repeat the '
            "checkpoint's flags, or leave out --load to train from scratch"
        )


def check_checkpoints_of(args: argparse.Namespace, residual: ResidualConfig) -> None:
    """Check every checkpoint that ``args`` names."""
    for name in ('load', 'pretrained_checkpoint'):
        source = getattr(args, name, None)
        step = getattr(args, 'ckpt_step', None) if name == 'load' else None
        saved = checkpoint_arguments(source, step) if source else None
        if saved is not None:
            check_checkpoint(saved, residual, source)
