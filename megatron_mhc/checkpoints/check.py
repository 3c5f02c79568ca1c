"""Refuse a checkpoint whose residual topology differs from the run's, before a model is built.

Stock Megatron loads a hyper-connection checkpoint into a standard model without a word: extra keys
are ignored. The arguments saved in every checkpoint tell which topology it has. Reading them runs
no code that a file names; what is more than plain values ends the run.
"""

from __future__ import annotations

import argparse
import pathlib
import types
import zipfile
from typing import Any, NamedTuple

from megatron_mhc.checkpoints.files import (
    METADATA_FILE,
    RANK_FILES,
    TRACKER,
    format_of,
    iteration_folder,
)
from megatron_mhc.checkpoints.layout import check_chunks
from megatron_mhc.checkpoints.plain import plain_load
from megatron_mhc.checkpoints.stored import Stored
from megatron_mhc.inputs.refusal import is_first_rank
from megatron_mhc.inputs.values import flag_of
from megatron_mhc.settings.flag import structure
from megatron_mhc.settings.flags_residual import (
    residual_config_from_args,
    same_structure,
    saved_residual_config,
)
from megatron_mhc.settings.residual import NORM_EPS, PAPER_NORM_EPS, ResidualConfig

# Megatron-LM's own hyper-connections, on its main and dev branches.
FOREIGN = ('enable_mhc_connections', 'enable_hyper_connections')


class Found(NamedTuple):
    """A checkpoint that Megatron is about to load.

    Attributes:
        flag: what named it; source: the folder that it named.
        folder: of the iteration.
        format: on disk: ``torch_dist``, ``torch``, or another that is Megatron's alone.
        args: those of the run that saved it; None where it has none.
        chunks: of the ``torch`` format, the keys of the model's parts in the first rank's file.
    """

    flag: str
    source: str
    folder: pathlib.Path
    format: str
    args: argparse.Namespace | None
    chunks: tuple[str, ...] = ()


def find_checkpoint(flag: str, directory: str, step: int | None) -> Found | None:
    """What is stored in the folder ``directory``, which ``flag`` named; None where nothing is.

    Args:
        step: ``--ckpt-step``, an iteration other than the tracker's.

    Raises:
        ValueError: the checkpoint is absent, damaged, or holds more than plain values.
    """
    if '://' in directory:
        # An object store, which only Megatron reads.
        return None
    folder = iteration_folder(pathlib.Path(directory), step, flag)
    if folder is None:
        return None
    try:
        kind = format_of(folder)
        if kind == 'torch_dist':
            state = _common(folder)
        elif kind == 'torch':
            # Mapped, so that of one file per rank only the arguments are read.
            file = min(folder.glob(RANK_FILES))
            state = plain_load(file, mmap=zipfile.is_zipfile(file))
        elif kind is None:
            raise ValueError(
                f'{folder.name} holds no checkpoint: neither metadata.json and {METADATA_FILE} nor '
                f'{RANK_FILES}'
            )
        else:
            return Found(flag, directory, folder, kind, None)
        args = _arguments(state)
    except (ValueError, OSError) as error:
        raise ValueError(
            f'{flag} {directory}: {error}; choose another iteration with --ckpt-step'
        ) from error
    chunks = tuple(key for key in state if key.startswith('model'))
    return Found(flag, directory, folder, kind, args, chunks if kind == 'torch' else ())


def _common(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / METADATA_FILE).exists():
        raise ValueError(f'{folder.name} has no {METADATA_FILE}, so its tensors cannot be found')
    return Stored(folder, sizes=is_first_rank()).common()


def _arguments(state: Any) -> argparse.Namespace | None:
    if not isinstance(state, dict):
        raise ValueError(f'it holds a {type(state).__name__}, and no checkpoint of Megatron')
    if 'args' not in state:
        return None
    args = state['args']
    if not isinstance(args, argparse.Namespace | types.SimpleNamespace):
        raise ValueError(
            f'its saved arguments are a {type(args).__name__} where Megatron saves a Namespace, so '
            'its model cannot be told'
        )
    return args if isinstance(args, argparse.Namespace) else argparse.Namespace(**vars(args))


def checkpoint_arguments(directory: str, step: int | None = None) -> argparse.Namespace | None:
    """The arguments saved with what ``--load`` names; None where there are none.

    Args:
        step: ``--ckpt-step``, an iteration other than the tracker's.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    found = find_checkpoint('--load', directory, step)
    return None if found is None else found.args


def check_checkpoint(
    saved: argparse.Namespace, residual: ResidualConfig, source: str, flag: str = '--load'
) -> None:
    """Raise ValueError unless weights saved with ``saved`` fit a model built with ``residual``."""
    for name in FOREIGN:
        if getattr(saved, name, False):
            raise ValueError(
                f"{flag} {source}: the checkpoint was trained with Megatron-LM's own {name}, whose "
                f'weights are laid out otherwise; `megatron-mhc convert {source} NEW --to mhc` '
                'makes one that fits'
            )
    # Megatron-LM stores flags of the same names in checkpoints that do not use them.
    ours = hasattr(saved, 'residual_type')
    try:
        stored = saved_residual_config(saved) if ours else ResidualConfig('standard')
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{flag} {source}: its saved arguments cannot be understood ({error}); choose another '
            'iteration with --ckpt-step'
        ) from error
    if not same_structure(stored, residual):
        raise ValueError(
            f'{flag} {source}: the checkpoint was trained with residual connections '
            f'[{stored.describe()}] but this run asks for [{residual.describe()}]; '
            f'{_remedy(stored, residual, source)}'
        )


def _remedy(stored: ResidualConfig, residual: ResidualConfig, source: str) -> str:
    was, wanted = dict(structure(stored)), dict(structure(residual))
    differ = {name for name in was.keys() | wanted.keys() if was.get(name) != wanted.get(name)}
    if 'numerics' in differ and differ <= {'numerics', 'norm_eps', 'stream_merge'}:
        flags = ''.join(
            f' {flag_of(f"mhc_{name}")} {was[name]}'
            for name in ('numerics', 'norm_eps', 'stream_merge')
            if name in differ
        )
        return f'go on with{flags}, or leave out --load to train from scratch'
    if differ == {'norm_eps'}:
        return (
            f'go on with --mhc-norm-eps {stored.norm_eps:g} (checkpoints from before that flag: '
            f'{PAPER_NORM_EPS:g}), or leave out --load to train from scratch'
        )
    n, merge = residual.num_residual_streams, residual.stream_merge
    upcycled = ResidualConfig(
        norm_eps=residual.norm_eps,
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
            ('--mhc-norm-eps', f'{residual.norm_eps:g}', f'{NORM_EPS:g}'),
        )
        if value != usual
    )
    return (
        'give it streams under which it computes the same: '
        f'`megatron-mhc convert {source} NEW --to mhc{flags}`'
    )


def found_checkpoints(args: argparse.Namespace) -> list[Found]:
    """What Megatron may load: ``--load``, or ``--pretrained-checkpoint`` where that has nothing.

    Non-persistent checkpoints lie in a folder of their own, and the newer of the two is loaded.

    Raises:
        ValueError: one of them cannot be loaded, or ``--pretrained-checkpoint`` has none.
    """
    flag, directory = '--load', args.load
    pretrained = getattr(args, 'pretrained_checkpoint', None)
    if pretrained and not (directory and (pathlib.Path(directory) / TRACKER).is_file()):
        flag, directory = '--pretrained-checkpoint', pretrained
        if '://' not in pretrained and not (pathlib.Path(pretrained) / TRACKER).is_file():
            raise ValueError(
                f'{flag} {pretrained}: there is no {TRACKER} in it; name a folder that --save wrote'
            )
    if not directory:
        return []
    places = [(flag, directory, args.ckpt_step)]
    if getattr(args, 'non_persistent_ckpt_type', None) == 'global':
        apart = getattr(args, 'non_persistent_global_ckpt_dir', None)
        beside = str(pathlib.Path(directory) / 'non_persistent')
        name = '--non-persistent-global-ckpt-dir' if apart else flag
        places.append((name, apart or beside, None))
    found = (find_checkpoint(*place) for place in places)
    return [checkpoint for checkpoint in found if checkpoint is not None]


def check_checkpoints(
    args: argparse.Namespace, residual: ResidualConfig, checkpoints: list[Found]
) -> None:
    """Check what Megatron will load, ``found_checkpoints``: of this topology, and of this layout.

    Raises:
        ValueError: it cannot be loaded, or would leave a part of the model as it was initialised.
    """
    for found in checkpoints:
        own = residual.residual_type != 'standard' or getattr(args, 'engram_layers', None)
        if found.args is None and own:
            raise ValueError(
                f'{found.flag} {found.source}: {found.folder.name} has no saved arguments, so '
                f'nothing tells whether its weights fit --residual-type {residual.residual_type}; '
                'load what Megatron saved or `megatron-mhc convert` wrote'
            )
        check_chunks(args, found)
        if found.args is None:
            continue
        check_checkpoint(found.args, residual, found.source, found.flag)
        if args.load and loads_optimizer(args):
            check_optimizer_state(found.args, residual, found.source)


def loads_optimizer(args: argparse.Namespace) -> bool:
    """Whether Megatron takes optimizer and scheduler, not only weights, from a checkpoint."""
    return not (args.no_load_optim or args.finetune)


def check_optimizer_state(saved: argparse.Namespace, residual: ResidualConfig, source: str) -> None:
    """Raise ValueError where Megatron would look for phi in a parameter group that is not there."""
    stored = residual_config_from_args(saved) if hasattr(saved, 'residual_type') else residual
    for name in ('mapping_lr_mult', 'mapping_optimizer'):
        was, wanted = getattr(stored, name), getattr(residual, name)
        if was != wanted:
            flag = flag_of(f'mhc_{name}')
            raise ValueError(
                f'{flag} {wanted}: the optimizer state in --load {source} was saved with {was}, '
                'and Megatron finds parameter groups by their settings; repeat '
                f'{flag} {was}, or start with a new optimizer: --no-load-optim'
            )
