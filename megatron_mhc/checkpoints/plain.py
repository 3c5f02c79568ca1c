"""Read pickles of a checkpoint without running any code that they name.

Megatron and torch pickle plain values in three places: the saved arguments, ``.metadata`` of a
distributed checkpoint, and the files of the ``torch`` format. Each is read here by an unpickler
that knows the classes they put there and refuses every other.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

# What readers raise for a file that is cut short or damaged.
_BROKEN = (
    *(RuntimeError, OSError, EOFError, KeyError, AttributeError, IndexError, ValueError),
    *(TypeError, MemoryError, OverflowError, NotImplementedError),
)
_CHECKPOINT = 'torch.distributed.checkpoint.'
_METADATA_CLASSES = {
    (_CHECKPOINT + module, name)
    for module, names in {
        'metadata': 'Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata '
        'TensorProperties ChunkStorageMetadata StorageMeta _MEM_FORMAT_ENCODING',
        'planner': 'SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData',
        'filesystem': '_StorageInfo _StoragePrefix',
    }.items()
    for name in names.split()
} | {
    ('torch', 'Size'),
    ('torch.serialization', '_get_layout'),
    ('collections', 'OrderedDict'),
}
# As Python up to 3.12, and as 3.13, call it; each reads what the other wrote.
_PATH_NAMES = ('pathlib.PosixPath', 'pathlib._local.PosixPath')


def plain_load(file: pathlib.Path | io.BytesIO, name: str = '', **options: Any) -> Any:
    """``torch.load`` of plain values: tensors, Python's own, and classes that Megatron saves.

    Args:
        file: what to read; ``name`` is what messages call it.
        options: of ``torch.load``.

    Raises:
        ValueError: the file holds another class, or is cut short.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS

    # On leaving, torch forgets all that it is given here, also what others had registered.
    known = torch.serialization.get_safe_globals()
    missing = [entry for entry in SAFE_GLOBALS if entry not in known]
    missing += [(pathlib.PosixPath, path) for path in _PATH_NAMES]
    with one_line(name or str(file)), torch.serialization.safe_globals(missing):
        return torch.load(file, map_location='cpu', weights_only=True, **options)


def check_archive(file: pathlib.Path | io.BytesIO, name: str = '') -> None:
    """Compare the checksums of what ``torch.save`` wrote, which ``torch.load`` does not.

    Raises:
        ValueError: one of them differs.
    """
    name = name or str(file)
    if not zipfile.is_zipfile(file):
        # Of torch's older format, or cut short: loading it tells which.
        return
    with one_line(name, zipfile.BadZipFile, zlib.error):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f'{name} is damaged: the checksum of {damaged} differs; take another copy, or another '
            'iteration'
        )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f'{module}.{name}' in _PATH_NAMES:
            return pathlib.PosixPath
        dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')


def load_metadata(file: pathlib.Path) -> Metadata:
    """What ``FileSystemReader.read_metadata`` returns, which unpickles any class.

    Raises:
        ValueError: the file is absent, cut short, or holds another class.
    """
    with one_line(str(file)), file.open('rb') as stream:
        metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f'GLOBAL {type(metadata).__name__}')
        return metadata


@contextlib.contextmanager
def one_line(name: str, *others: type[Exception]) -> Iterator[None]:
    """Errors of readers, and ``others``, as one line that begins with ``name``."""
    broken: tuple[type[Exception], ...] = (*_BROKEN, *others)
    try:
        yield
    except pickle.UnpicklingError as error:
        if 'GLOBAL' not in str(error):
            raise ValueError(f'{name} {_unreadable(error)}') from error
        raise ValueError(
            f'{name} holds more than plain values ({_first_line(error)}), which could run code as '
            'it is loaded; save the checkpoint again without them'
        ) from error
    except broken as error:
        raise ValueError(f'{name} {_unreadable(error)}') from error


def _unreadable(error: BaseException) -> str:
    return f'cannot be read ({_first_line(error)}): take another copy, or another iteration'


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or ['no message']
    line = next((line for line in lines if 'GLOBAL' in line), lines[0])
    # torch goes on to say how the class could be let through.
    line = line.partition(' was not an allowed global')[0]
    return f'{type(error).__name__}: {line.strip()}'


@contextlib.contextmanager
def without_group_warning() -> Iterator[None]:
    """torch warns that it assumes a single process, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed')
        yield
