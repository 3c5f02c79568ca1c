"""A checkpoint that could not be written: one line with the folder, its space, and what is whole.

Megatron ends with a traceback of its writer processes, in which the cause is often lost on the way.
"""

from __future__ import annotations

import pathlib
import shutil
import traceback
import types

from megatron_mhc.checkpoints.files import TRACKER, iteration_folder
from megatron_mhc.settings.flags_residual import parsed_arguments

# Functions of Megatron's from which a checkpoint is written, also by writers in the background.
SAVING = ('save_checkpoint', 'maybe_finalize_async_save')
# torch's own format says a failed write in its C++ words.
WRITER = ('PytorchStreamWriter', 'inline_container')
GIB = 2**30


def explain(error: BaseException, trace: types.TracebackType | None) -> str | None:
    """The line for ``error``, raised through ``trace``; None unless it is a failed write.

    Args:
        error: as it left the training loop.
        trace: its traceback, which says whether a checkpoint was being written.
    """
    saving = [frame for frame, _ in traceback.walk_tb(trace) if frame.f_code.co_name in SAVING]
    args = parsed_arguments()
    if args is None or not args.save or not saving or not _is_a_failed_write(error):
        return None
    # A writer in the background may be behind by several iterations.
    iteration = saving[-1].f_locals.get('iteration')
    what = 'a checkpoint' if iteration is None else f'the checkpoint of iteration {iteration}'
    folder = pathlib.Path(args.save)
    whole = newest_whole(folder)
    if whole is not None:
        kept = f'{whole.name} is whole and --load {folder} goes on from it'
    elif (folder / TRACKER).exists():
        kept = f'{TRACKER} was cut short too: write the last whole iteration into it'
    else:
        kept = 'no checkpoint there is whole'
    return (
        f'--save {folder}: {what} could not be written ({cause(error)}); {_space(folder)}; '
        f'{kept}; make room or choose another folder, and start again'
    )


def newest_whole(folder: pathlib.Path) -> pathlib.Path | None:
    """The iteration that the tracker file names, which Megatron writes last."""
    try:
        return iteration_folder(folder, None, '--load')
    except ValueError:
        # The tracker itself may be what was cut short.
        return None


def cause(error: BaseException) -> str:
    """Type and first line of what is at the bottom of ``error``."""
    # torch's checkpoint errors carry those of the ranks.
    failures = getattr(error, 'failures', None)
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f'rank {rank}: {cause(inner)}'
    first = (str(error).strip() or 'no message').splitlines()[0]
    return f'{type(error).__name__}: {first}'


def _is_a_failed_write(error: BaseException) -> bool:
    if isinstance(error, OSError) or getattr(error, 'failures', None):
        return True
    return any(word in str(error) for word in WRITER)


def _space(folder: pathlib.Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f'the folder cannot be looked at ({error.strerror})'
    return f'{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free there'
