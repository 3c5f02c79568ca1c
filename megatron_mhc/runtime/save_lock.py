"""One run at a time saves into a folder: a file there says which one, and beats while it runs.

A run that ends takes its file away. One that was killed leaves it; on the same machine that is seen
at once by its process, from another one by a heartbeat that stays away. Nobody's clock is compared
with another's, and no lock of the file system is used, which shared ones often lack.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import threading
import time
import uuid
from typing import Any

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.runtime.process_identity import ProcessIdentity, is_gone, this_process

NAME = '.megatron-mhc-lock'
# Seconds between two heartbeats, and without one after which a run elsewhere counts as dead.
BEAT, PATIENCE = 10.0, 45.0

# Folder -> what this process wrote into its lock.
_held: dict[pathlib.Path, str] = {}


def hold(folder: str, flag: str = '--save') -> None:
    """Take ``folder`` until this process ends; waits up to PATIENCE for a sign of life of another.

    Args:
        folder: is made where it is not there.
        flag: what named it, for messages.

    Raises:
        ValueError: another run saves there, or the folder cannot be written to.
    """
    path = pathlib.Path(folder).absolute() / NAME
    if path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _create(path):
            _take_over(path, f'{flag} {folder}')
    except OSError as error:
        raise ValueError(
            f'{flag} {folder}: cannot be written to ({error.strerror or error}); make it writable '
            'or choose another folder'
        ) from error
    atexit.register(release, path)
    threading.Thread(target=_beat, args=(path, _held[path]), daemon=True, name=NAME).start()


def release(path: pathlib.Path) -> None:
    """Take the lock away, where it is still this process's own."""
    text = _held.pop(path, None)
    with contextlib.suppress(OSError):
        if text is not None and _process(text).pid == os.getpid() and path.read_text() == text:
            path.unlink()


def _create(path: pathlib.Path) -> bool:
    """Put the lock in place as one act, with its content; False where there is one already."""
    entry = {
        'process': dataclasses.asdict(this_process()),
        'since': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
        'token': uuid.uuid4().hex,
    }
    text = json.dumps(entry)
    draft = path.with_name(f'{NAME}-{entry["token"]}')
    draft.write_text(text)
    try:
        # A link, unlike an open, is exclusive on every NFS, and never seen half written.
        os.link(draft, path)
    except FileExistsError:
        # NFS may say so of a link that it has just made, when an answer was lost.
        seen = _read(path)
        if seen is None or seen[0] != text:
            return False
    except OSError:
        # A file system without hard links.
        try:
            with path.open('x') as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        draft.unlink()
    _held[path] = text
    return True


def _take_over(path: pathlib.Path, named: str) -> None:
    """Move a dead run's lock out of the way.

    Raises:
        ValueError: its holder lives.
    """
    seen = _read(path)
    if seen is None:
        return
    text, _ = seen
    holder = _process(text)
    gone = is_gone(holder)
    if gone is None:
        gone = not _beats(path, seen)
    if not gone:
        raise ValueError(
            f'{named}: another run saves there, {holder} since {_since(text)}, and two '
            "would overwrite each other's checkpoints; wait for its end, choose another folder, or "
            f'delete {path} if you know that it does not run'
        )
    aside = path.with_name(f'{NAME}-{uuid.uuid4().hex}')
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if aside.read_text() == text:
            announce(f'{named}: taken over from {holder}, which is gone')
        else:
            # Somebody was faster, and this is already the lock of a living run.
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _beats(path: pathlib.Path, seen: tuple[str, int]) -> bool:
    """Whether the lock shows a sign of life within PATIENCE; ends at the first one."""
    announce(f'{path} names {_process(seen[0])}: waiting up to {PATIENCE:g} s for a sign of life')
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE / 4))
        now = _read(path)
        if now != seen:
            # Gone altogether, it was taken away by a run that has ended.
            return now is not None
    return False


def _read(path: pathlib.Path) -> tuple[str, int] | None:
    """Content and time of the last beat; None where there is no lock."""
    try:
        # Opened, not looked at by name: NFS then asks its server.
        with path.open() as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat(path: pathlib.Path, text: str) -> None:
    while _held.get(path) == text:
        # A file system that stalls must not end the run; the next beat may reach it.
        with contextlib.suppress(OSError):
            seen = _read(path)
            if seen is not None and seen[0] == text:
                os.utime(path)
            elif path in _held:
                where = 'taken away' if seen is None else f'taken over by {_process(seen[0])}'
                line = f'[megatron-mhc] {path} was {where}: another run may save there'
                print(line, file=sys.stderr, flush=True)
                return
        time.sleep(BEAT)


def _entry(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except ValueError:
        # Cut short on a file system without hard links.
        return {}
    return entry if isinstance(entry, dict) else {}


def _process(text: str) -> ProcessIdentity:
    try:
        return ProcessIdentity(**_entry(text)['process'])
    except (KeyError, TypeError):
        return ProcessIdentity('an unknown host', '', 0, '')


def _since(text: str) -> str:
    return _entry(text).get('since', 'an unknown time')
