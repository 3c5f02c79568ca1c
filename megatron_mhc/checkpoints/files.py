"""Where a checkpoint lies: the iteration that Megatron would take, and the format on disk."""

from __future__ import annotations

import json
import pathlib

TRACKER = 'latest_checkpointed_iteration.txt'
# Training starts anew from a release: iteration 0, with a new optimizer.
RELEASE = 'release'
# What each format has in the folder of an iteration.
CONFIG_FILE = 'metadata.json'
METADATA_FILE = '.metadata'
RANK_FILES = 'mp_rank_*/model_optim_rng.pt'


def iteration_folder(root: pathlib.Path, step: int | None, flag: str) -> pathlib.Path | None:
    """The folder of an iteration, chosen as Megatron chooses it: a release stays one at any step.

    Args:
        root: what ``--load`` names.
        step: ``--ckpt-step``, an iteration other than the tracker file's; 0 is none.
        flag: what named ``root``, for messages.

    Returns:
        None where the folder is absent or has no tracker file, and Megatron starts from scratch.

    Raises:
        ValueError: ``root`` is no folder, the tracker names no iteration, or none that is there.
    """
    step_flag = '--step' if flag == 'SRC' else '--ckpt-step'
    if step is not None and step < 0:
        raise ValueError(
            f'{step_flag} {step}: iterations are numbered from 1; name one that {root} has, or '
            'leave it out for the latest'
        )
    if root.exists() and not root.is_dir():
        raise ValueError(
            f'{flag} {root}: it is a file, so Megatron would start from scratch; name the folder '
            f'that holds {TRACKER}'
        )
    written = _written(root, flag)
    if written is None and not step:
        return None
    folder = (
        root / RELEASE if written == RELEASE else root / f'iter_{step or int(written or 0):07d}'
    )
    if not folder.is_dir():
        there = sorted(path.name for path in root.glob('iter_*') if path.is_dir())
        named = f'{step_flag} {step}' if step and written != RELEASE else TRACKER
        raise ValueError(
            f'{flag} {root}: {named} names {folder.name}, which is not there; it has '
            f'{", ".join(there[-5:]) or "no iteration"}: name one of them with {step_flag}'
        )
    return folder


def _written(root: pathlib.Path, flag: str) -> str | None:
    """What the tracker file says: an iteration, as Megatron reads one, or a release."""
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    try:
        written = tracker.read_text().strip()
        if written == RELEASE or int(written) >= 0:
            return written
    except (ValueError, OSError):
        written = tracker.read_bytes()[:40].decode(errors='replace') if _readable(tracker) else ''
    raise ValueError(
        f'{flag} {root}: {TRACKER} holds {written!r}, and wanted is an iteration or "{RELEASE}"; '
        'write the number of an iter_* folder into it'
    )


def _readable(file: pathlib.Path) -> bool:
    try:
        with file.open('rb'):
            return True
    except OSError:
        return False


def format_of(folder: pathlib.Path) -> str | None:
    """``torch_dist``, ``torch``, ``dcp`` (of torch or of FSDP); None where it is none of them.

    Raises:
        ValueError: ``metadata.json`` is no description of a checkpoint.
    """
    config = folder / CONFIG_FILE
    if config.exists():
        try:
            return str(json.loads(config.read_text())['sharded_backend'])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f'{config} cannot be read ({type(error).__name__}: {error}): take another copy, or '
                'another iteration'
            ) from error
    if any(folder.glob(RANK_FILES)):
        return 'torch'
    return 'dcp' if (folder / METADATA_FILE).exists() else None
