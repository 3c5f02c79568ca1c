"""Supported and tested versions: the one place where they are written.

The code, ``setup.py``, the README tables (checked by a test) and CI all read this file. It uses the
standard library alone, so that ``setup.py`` can execute it before anything is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import runpy
import sys

PYTHON_MIN = (3, 12)
CORE_MIN = (0, 17)
CORE_BELOW = (0, 20)
CORE_SPECIFIER = '>=0.17,<0.20'

# Release -> how far it is tested here. "full": the whole suite through the real training loop.
# "contract": import, patch contract, and a tiny forward and backward equal to a plain reference.
TESTED = {'0.19.2': 'full', '0.18.2': 'contract', '0.17.1': 'contract'}
TRITON_TESTED = ('3.6.0', '3.7.0', '3.8.0', '3.9.0')
# Oldest first. CI has the whole suite on the one that pip takes, ops, kernels and contract on the
# ends of the range.
TORCH_TESTED = ('2.11.0', '2.14.1', '2.15.0')
PYTHON_TESTED = ('3.12', '3.13')
RANGES = {'Python': PYTHON_TESTED, 'torch': TORCH_TESTED, 'triton': TRITON_TESTED}
# Not released yet: signatures are recorded, and the contract tests run on that commit of Megatron's
# main branch, so that a tree of it fits and the release itself is soon supported.
PREVIEWED = {'0.20': 'd98e8a64'}


def core_folder() -> pathlib.Path | None:
    """Folder of the ``megatron.core`` that Python would import here; None where there is none.

    Nothing of it is imported. What counts is where Python looks, not what pip has recorded: a
    source tree is as good as a wheel, and the one that stands first wins.
    """
    try:
        spec = importlib.util.find_spec('megatron.core')
    except ModuleNotFoundError:
        return None
    return pathlib.Path(spec.origin).parent if spec is not None and spec.origin else None


def core_version() -> str | None:
    """Version of the Megatron-Core that would be imported, e.g. ``0.19.2``; None where absent.

    Raises:
        RuntimeError: its ``package_info.py`` does not tell.
    """
    folder = core_folder()
    if folder is None:
        return None
    info = folder / 'package_info.py'
    try:
        return _version_said(info, info.stat().st_mtime_ns)
    except Exception as error:  # whatever running the file raises
        raise RuntimeError(
            f'{info}: no version can be read ({type(error).__name__}: {error}); restore this file '
            'of Megatron-Core'
        ) from error


@functools.cache
def _version_said(info: pathlib.Path, mtime_ns: int) -> str:
    """By the file as it was at ``mtime_ns``: running it starts git, and every patch asks."""
    version: str = runpy.run_path(str(info))['__shortversion__']
    _numbers(core_minor(version))
    return version


def is_patched(core: pathlib.Path) -> bool:
    """Whether ``megatron-mhc patch`` has put its seams into the tree of this ``megatron/core``."""
    entry = core.parent / 'training' / 'arguments.py'
    return entry.is_file() and b'@mhc_seam("arguments"' in entry.read_bytes()


def describe_core() -> str:
    """Version and folder of the Megatron-Core that would be imported, and whether it is patched."""
    folder, version = core_folder(), core_version()
    if folder is None:
        return 'megatron-core is not installed'
    return f'megatron-core {version} in {folder}, {"" if is_patched(folder) else "not "}patched'


def untested() -> list[str]:
    """What is installed outside of the tested range, e.g. ``torch 2.9.1 (tested: 2.11 - 2.15)``."""
    import importlib.metadata

    found = {'Python': '.'.join(map(str, sys.version_info[:2]))}
    for name in ('torch', 'triton'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    said = []
    for name, version in found.items():
        tested = RANGES[name]
        low, high = core_minor(tested[0]), core_minor(tested[-1])
        if not _numbers(low) <= _numbers(core_minor(version)) <= _numbers(high):
            said.append(f'{name} {version} (tested: {low} - {high})')
    return said


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split('.')))


def core_minor(version: str) -> str:
    """``0.19.2`` -> ``0.19``, the granularity at which signatures are recorded."""
    return '.'.join(version.split('.')[:2])


def nearest_minor(version: str) -> str:
    """The minor release with recorded signatures next to ``version``: itself where it is one."""
    tested = sorted(_numbers(core_minor(v)) for v in (*TESTED, *PREVIEWED))
    seen = _numbers(core_minor(version))
    below = [minor for minor in tested if minor <= seen] or tested[:1]
    return '.'.join(map(str, below[-1]))


def require_supported_core() -> str:
    """Return the version that would be imported; RuntimeError where it is absent or out of range.

    A patched tree may be out of range: its user took its signatures as they are.
    """
    if sys.version_info[:2] < PYTHON_MIN:
        raise RuntimeError(
            f'Python {sys.version.split()[0]} is too old: megatron-core {CORE_SPECIFIER} needs '
            f'Python >= {PYTHON_MIN[0]}.{PYTHON_MIN[1]}. Run this under a newer interpreter.'
        )
    version = core_version()
    if version is None:
        raise RuntimeError(
            'megatron-core is not installed in this environment: '
            f'pip install "megatron-core[training]{CORE_SPECIFIER}", run a script of a Megatron-LM '
            'tree, or put the tree on PYTHONPATH'
        )
    folder = core_folder()
    in_range = CORE_MIN <= _numbers(core_minor(version)) < CORE_BELOW
    if not in_range and (folder is None or not is_patched(folder)):
        raise RuntimeError(
            f'megatron-core {version} in {folder} is outside the supported range {CORE_SPECIFIER}: '
            'the patched symbols are only known there. Install a release inside it, e.g. '
            f'{next(iter(TESTED))}; a tree of your own is taken as it is by {take_as_it_is(folder)}'
        )
    return version


def take_as_it_is(core: pathlib.Path | None) -> str:
    """The command that puts seams into the tree of ``core`` for signatures that no release has."""
    tree = 'TREE' if core is None else core.parent.parent
    return f'`megatron-mhc patch {tree} --apply --untested`'


def require_one_tree() -> None:
    """Raise RuntimeError where imported parts of Megatron-LM come from two copies of it.

    ``megatron`` is a namespace: what one copy lacks Python takes from the next one on its path. A
    folder that only adds to the namespace, with no core of its own, is no other copy.
    """
    core = pathlib.Path(sys.modules['megatron.core'].__file__ or '').parent
    for name, module in list(sys.modules.items()):
        if name.startswith('megatron.') and name.count('.') == 1 and hasattr(module, '__path__'):
            part = pathlib.Path(next(iter(module.__path__)))
            other = part.parent / 'core'
            if other != core and (other / 'package_info.py').is_file():
                raise RuntimeError(
                    f'two copies of Megatron are mixed: megatron.core is {core}, {name} is {part}; '
                    f'put one copy first for both, e.g. PYTHONPATH={other.parent.parent}'
                )
