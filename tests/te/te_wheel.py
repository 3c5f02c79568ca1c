"""Transformer Engine's wheel, unpacked under ``.cache``: ``python te_wheel.py`` prints the folder.

It is 1 MB of Python. It cannot be part of the environment: without its compiled half, which needs
CUDA, importing it raises, and Megatron would import it wherever it is on the path.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

VERSION = '2.20.2'
CACHE = pathlib.Path(__file__).parents[2] / '.cache'


def unpacked() -> pathlib.Path:
    """The folder, fetched from the package index the first time.

    Raises:
        RuntimeError: pip cannot fetch it.
    """
    folder = CACHE / f'transformer-engine-{VERSION}'
    if not folder.is_dir():
        part = CACHE / f'{folder.name}.{os.getpid()}'
        command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', part]
        pip = subprocess.run(
            [*command, f'transformer-engine=={VERSION}'], capture_output=True, text=True
        )
        if pip.returncode:
            shutil.rmtree(part, ignore_errors=True)
            raise RuntimeError(f'pip cannot fetch transformer-engine=={VERSION}: {pip.stderr}')
        part.rename(folder)
    return folder


if __name__ == '__main__':
    print(unpacked())
