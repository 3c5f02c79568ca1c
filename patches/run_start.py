"""Patch: the start of training, when process groups exist and nothing has been built."""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_mhc.inputs.refusal import announce, refuse
from megatron_mhc.inputs.values import flag_of
from megatron_mhc.patches.engine import Patch
from megatron_mhc.runtime import run_end, save_lock
from megatron_mhc.settings.flags_residual import parsed_arguments

_STARTS = itertools.count()


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup_model_and_optimizer(*args, **kwargs):
        run_end.watch()
        hold_folders()
        return original(*args, **kwargs)

    return setup_model_and_optimizer


def hold_folders() -> None:
    """Take the folders of ``--save`` for this run; the first rank does, and tells the others.

    Ends all ranks in one line where another run has one of them.
    """
    args = parsed_arguments()
    names = ('save', 'non_persistent_global_ckpt_dir')
    folders = {flag_of(name): folder for name in names if (folder := getattr(args, name, None))}
    store, key = dist.distributed_c10d._get_default_store(), f'megatron_mhc/lock/{next(_STARTS)}'
    if dist.get_rank() == 0:
        store.set(key, _taken(folders))
    refusal = store.get(key).decode()
    if refusal:
        refuse(pathlib.Path(sys.argv[0]).name, refusal)


def _taken(folders: dict[str, str]) -> str:
    """What stands against it; empty if all are held now."""
    for flag, folder in folders.items():
        if '://' in folder:
            announce(f'{flag} {folder}: no lock keeps other runs out of an object store')
            continue
        try:
            save_lock.hold(folder, flag)
        except ValueError as error:
            return str(error)
    return ''


RUN_START_PATCH = Patch(
    id='run-start',
    target='megatron.training.training:setup_model_and_optimizer',
    wrap=_wrap,
    reason='process groups exist, and nothing has been built or read yet',
    fingerprints={'0.17': '5aec9cdb', '0.18': '5aec9cdb', '0.19': 'd3bb6159'},
)
