"""Where Python looks for modules when a launcher stands between it and the script.

``python SCRIPT`` puts the folder of SCRIPT first on ``sys.path``, ``python -m LAUNCHER SCRIPT``
the current folder, and a console script the folder it is installed in. A tree of Megatron is
found, or missed, by this entry alone.
"""

from __future__ import annotations

import os
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# What has taken the place of Python's own entry.
_entered: str | None = None


def enter_folder(folder: pathlib.Path) -> None:
    """Make ``sys.path`` what it would be if Python had been given a script in ``folder``.

    What Python put first for the program that runs now goes; PYTHONPATH and everything installed
    stays. Under ``-P``, ``-I`` and PYTHONSAFEPATH Python puts nothing first, and neither does this.
    """
    global _entered
    if sys.flags.safe_path:
        return
    own = _entered or _own_entry()
    at = sys.path.index(own) if own in sys.path else 0
    _entered = str(folder.resolve())
    sys.path[at : at + (own in sys.path)] = [_entered]
    # A checkout of this package may have been found by the entry that is gone; modules that are not
    # loaded yet, and processes to come, still need it. Last, so that it stands before nothing.
    if not any(
        finder.find_spec(PACKAGE.name, None)
        for finder in sys.meta_path
        if hasattr(finder, 'find_spec')
    ):
        sys.path.append(str(PACKAGE.parent))


def enter_tree_at_hand() -> None:
    """Commands that run no script take the Megatron tree that they are started in, if in one.

    ``python -m megatron_mhc`` has the current folder first anyway; ``megatron-mhc`` has not.
    """
    if pathlib.Path('megatron', 'core', 'package_info.py').is_file():
        enter_folder(pathlib.Path.cwd())


def same_path_for_a_child() -> tuple[list[str], dict[str, str]]:
    """Options and environment with which a new interpreter looks where this one does."""
    # Entries that are no folders, as those of editable installations, come back by themselves.
    path = [os.path.abspath(entry) for entry in sys.path if os.path.exists(entry or '.')]
    return ['-P'], {**os.environ, 'PYTHONPATH': os.pathsep.join(path)}


def _own_entry() -> str | None:
    """What Python put first on ``sys.path`` for the program that is running; None if nothing."""
    main = sys.modules['__main__']
    if main.__spec__ is not None:
        try:
            return os.getcwd()
        except FileNotFoundError:
            return None
    file = getattr(main, '__file__', None)
    return '' if file is None else os.path.dirname(os.path.realpath(file))
