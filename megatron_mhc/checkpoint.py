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
# Megatron-LM's own hyper-connections, on its main and dev branches.
FOREIGN = ('enable_mhc_connections', 'enable_hyper_connections')


def checkpoint_arguments(directory: str, step: int | None = None) -> argparse.Namespace | None:
    """The arguments saved with a checkpoint of any format; None where there is nothing to read.

    Args:
        directory: what ``--load`` names: a folder with a tracker file.
        step: ``--ckpt-step``, an iteration other than the tracker's.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    folder = iteration_folder(pathlib.Path(directory), step)
    try:
        if (folder / 'metadata.json').is_file():
            from megatron.core.dist_checkpointing import load_common_state_dict

            return load_common_state_dict(str(folder)).get('args')
        # One file per rank: mapped, so that only the arguments are read. It is a pickle, as it is
        # for Megatron, which loads it whole a moment later.
        file = min(folder.glob('mp_rank_00*/model_optim_rng.pt'), default=None)
        if file is None:
            return None
        state = torch.load(file, map_location='cpu', mmap=True, weights_only=False)
        return state.get('args')
    except Exception as error:  # readers of several formats, each with errors of its own
        raise ValueError(
            f'--load {directory}: {folder.name} cannot be read ({type(error).__name__}: '
            f'{str(error).splitlines()[0] if str(error) else "no message"}); choose another '
            'iteration with --ckpt-step'
        ) from error


def iteration_folder(root: pathlib.Path, step: int | None) -> pathlib.Path:
    """The iteration's folder, chosen as Megatron chooses it: a release stays one at any step."""
    tracker = root / TRACKER
    written = tracker.read_text().strip() if tracker.is_file() else ''
    if written == 'release':
        return root / written
    return root / f'iter_{step or written:0>7}'


def check_checkpoint(saved: argparse.Namespace, residual: ResidualConfig, source: str) -> None:
    """Raise ValueError unless weights saved with ``saved`` fit a model built with ``residual``."""
    for name in FOREIGN:
        if getattr(saved, name, False):
            raise ValueError(
                f"--load {source}: the checkpoint was trained with Megatron-LM's own {name}, whose "
                f'weights are laid out otherwise; `megatron-mhc convert {source} NEW --to mhc` '
                'makes one that fits'
            )
    # Megatron-LM stores flags of the same names in checkpoints that do not use them.
    ours = hasattr(saved, 'residual_type')
    stored = residual_config_from_args(saved) if ours else ResidualConfig('standard')
    if not same_structure(stored, residual):
        raise ValueError(
            f'--load {source}: the checkpoint was trained with residual connections '
            f'[{stored.describe()}] but this run asks for [{residual.describe()}]; '
            f'{_remedy(stored, residual, source)}'
        )


def _remedy(stored: ResidualConfig, residual: ResidualConfig, source: str) -> str:
    n, merge = residual.num_residual_streams, residual.stream_merge
    upcycled = ResidualConfig(
        num_residual_streams=n,
        sinkhorn_iterations=residual.sinkhorn_iterations,
        stream_merge=merge if merge in ('mean', 'learned') else None,
    )
    # Exact streams exist for n >= 2 with Sinkhorn-Knopp and a mean or learned merge.
    if stored.enabled or n < 2 or not same_structure(upcycled, residual):
        return "repeat the checkpoint's flags, or leave out --load to train from scratch"
    flags = ''.join(
        f' {flag} {value}'
        for flag, value, usual in (
            ('--mhc-num-residual-streams', n, 4),
            ('--mhc-sinkhorn-iterations', residual.sinkhorn_iterations, 20),
            ('--mhc-stream-merge', merge, 'mean'),
        )
        if value != usual
    )
    return (
        'give it streams under which it computes the same: '
        f'`megatron-mhc convert {source} NEW --to mhc{flags}`'
    )


def saved_arguments(args: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """Source and arguments of what Megatron may load: ``--load``, else ``--pretrained-checkpoint``.

    Non-persistent checkpoints lie in a folder of their own, and the newer of the two is loaded.
    """
    if args.load:
        apart = getattr(args, 'non_persistent_global_ckpt_dir', None)
        beside = pathlib.Path(args.load) / 'non_persistent'
        found = [
            (source, saved)
            for source, step in ((args.load, args.ckpt_step), (apart or str(beside), None))
            if (saved := checkpoint_arguments(source, step)) is not None
        ]
    else:
        found = []
    if not found and getattr(args, 'pretrained_checkpoint', None):
        saved = checkpoint_arguments(args.pretrained_checkpoint)
        found = [(args.pretrained_checkpoint, saved)] if saved is not None else []
    return found


def check_checkpoints_of(args: argparse.Namespace, residual: ResidualConfig) -> None:
    """Check the residual topology of the checkpoint that Megatron will load."""
    for source, saved in saved_arguments(args):
        check_checkpoint(saved, residual, source)
        if args.load and loads_optimizer(args):
            check_optimizer_state(saved, residual, source)


def loads_optimizer(args: argparse.Namespace) -> bool:
    """Whether Megatron takes optimizer and scheduler, not only weights, from a checkpoint."""
    return not (args.no_load_optim or args.finetune)


def check_optimizer_state(saved: argparse.Namespace, residual: ResidualConfig, source: str) -> None:
    """Raise ValueError where Megatron would look for phi in a parameter group that is not there."""
    stored = residual_config_from_args(saved) if hasattr(saved, 'residual_type') else residual
    for name in ('mapping_lr_mult', 'mapping_optimizer'):
        was, wanted = getattr(stored, name), getattr(residual, name)
        if was != wanted:
            flag = '--mhc-' + name.replace('_', '-')
            raise ValueError(
                f'{flag} {wanted}: the optimizer state in --load {source} was saved with {was}, '
                'and Megatron finds parameter groups by their settings; repeat '
                f'{flag} {was}, or start with a new optimizer: --no-load-optim'
            )
