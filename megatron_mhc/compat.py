"""Supported and tested versions: the one place where they are written.

The code, ``setup.py``, the README tables (checked by a test) and CI all read this file. It uses the
standard library alone, so that ``setup.py`` can execute it before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
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


def core_version() -> str | None:
    """Version of the Megatron-Core that would be imported, e.g. ``0.19.2``; None where absent.

    Reads ``megatron/core/package_info.py`` without importing ``megatron.core``, so that it is cheap
    and sees a source checkout on ``PYTHONPATH`` rather than a wheel installed beside it.
    """
    try:
        spec = importlib.util.find_spec('megatron.core')
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.origin:
        return None
    info = runpy.run_path(str(pathlib.Path(spec.origin).with_name('package_info.py')))
    return info['__shortversion__']


def untested() -> list[str]:
    """What is installed outside of the tested range, e.g. ``torch 2.9.1 (tested: 2.11 - 2.15)``."""
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
    """The tested minor release next to ``version``: itself where it is one."""
    tested = sorted(tuple(map(int, core_minor(v).split('.'))) for v in TESTED)
    seen = tuple(map(int, core_minor(version).split('.')))
    below = [minor for minor in tested if minor <= seen] or tested[:1]
    return '.'.join(map(str, below[-1]))


def require_supported_core() -> str:
    """Return the installed version, or raise RuntimeError when it is absent or out of range."""
    if sys.version_info[:2] < PYTHON_MIN:
        raise RuntimeError(
            f'Python {sys.version.split()[0]} is too old: megatron-core {CORE_SPECIFIER} needs '
            f'Python >= {PYTHON_MIN[0]}.{PYTHON_MIN[1]}. Run this under a newer interpreter.'
        )
    version = core_version()
    if version is None:
        raise RuntimeError(
            'megatron-core is not installed in this environment: '
            f'pip install "megatron-core[training]{CORE_SPECIFIER}"'
        )
    if not CORE_MIN <= tuple(int(p) for p in version.split('.')[:2]) < CORE_BELOW:
        raise RuntimeError(
            f'megatron-core {version} is outside the supported range {CORE_SPECIFIER}: the patched '
            f'symbols are only known there. Install a release inside it, e.g. {next(iter(TESTED))}.'
        )
    return version
