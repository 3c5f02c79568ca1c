"""Change the files of a user's tree all together, and tell beforehand what git has not seen."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping

from megatron_mhc.tree.edit import without_our_lines


def replace_all(contents: Mapping[pathlib.Path, bytes]) -> None:
    """Give every file its new contents, each in one step; where one fails, all keep the old.

    Raises:
        OSError: a file or folder cannot be written.
    """
    before = {path: path.read_bytes() for path in contents}
    staged, replaced = {}, []
    try:
        for path, content in contents.items():
            staged[path] = _stage(path, content)
        for path, temporary in staged.items():
            os.replace(temporary, path.resolve())
            replaced.append(path)
    except BaseException:
        for path in replaced:
            os.replace(_stage(path, before[path]), path.resolve())
        raise
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _stage(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """A temporary file beside ``path``: on its file system, with its permissions."""
    if not os.access(path, os.W_OK):
        raise PermissionError(f'{path} cannot be written')
    path = path.resolve()
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    with open(number, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(number)
    shutil.copymode(path, name)
    return pathlib.Path(name)


def uncommitted(root: pathlib.Path, paths: list[str]) -> list[str] | None:
    """Which of ``paths`` differ from git's last commit by more than our lines; None without git.

    It asks for contents and not for a status, because even that would write git's index.

    Raises:
        ValueError: there is a repository, and git does not answer.
    """
    if shutil.which('git') is None:
        return None
    inside = _git(root, 'rev-parse', '--is-inside-work-tree')
    if inside.returncode:
        reason = inside.stderr.decode(errors='replace').strip().splitlines()[:1]
        if reason and 'not a git repository' not in reason[0]:
            raise ValueError(f'git cannot be asked for uncommitted changes: {reason[0]}')
        return None
    if not _git(root, 'check-ignore', '--quiet', '--', paths[0]).returncode:
        return None
    return [path for path in paths if not _is_committed(root, path)]


def _is_committed(root: pathlib.Path, path: str) -> bool:
    # With filters: line ends as they are in the work tree.
    committed = _git(root, 'cat-file', '--filters', f'HEAD:./{path}')
    now = root.joinpath(path).read_bytes()
    same = without_our_lines(committed.stdout) == without_our_lines(now)
    return committed.returncode == 0 and same


def _git(root: pathlib.Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ['git', '-C', str(root), *command],
        capture_output=True,
        env={**os.environ, 'LC_ALL': 'C', 'GIT_OPTIONAL_LOCKS': '0'},
    )
