"""A ``torch_dist`` folder, read without Megatron, without a process group, and without its code.

Verified before anything is used: that every file is as long as ``.metadata`` says, and of all that
is read, the checksums (CRC-32) of its archive, its shape and its dtype.
"""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_mhc.checkpoints.files import METADATA_FILE
from megatron_mhc.checkpoints.plain import check_archive, load_metadata, one_line, plain_load

COMMON = 'common_state/shard_0_1'
COMMON_FILE = 'common.pt'


class Stored:
    """What ``.metadata`` of a folder lists.

    Args:
        sizes: look at the length of every file, too, and not only that it is there: a file system
            that thousands of nodes share is asked for the lengths once, by the first rank.

    Attributes:
        entries: name -> torch's ``TensorStorageMetadata`` or ``BytesStorageMetadata``.

    Raises:
        ValueError: ``.metadata`` is absent, damaged or more than plain values, or a file that it
            lists is absent or shorter than it says.
    """

    def __init__(self, folder: pathlib.Path, sizes: bool = True) -> None:
        self.folder = folder
        metadata = load_metadata(folder / METADATA_FILE)
        with one_line(str(folder / METADATA_FILE)):
            self.entries = dict(metadata.state_dict_metadata)
            self.places = dict(metadata.storage_data)
            self._check_files(sizes)

    def _check_files(self, sizes: bool) -> None:
        ends: dict[str, int] = {}
        for place in self.places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        there = set(os.listdir(self.folder))
        for name, end in ends.items():
            if pathlib.PurePath(name).name != name:
                raise ValueError(f'it names {name!r}, a file outside of its folder')
            if name not in there:
                raise ValueError(f'it lists {name}, which is not there')
            if not sizes:
                continue
            size = (self.folder / name).stat().st_size
            if size < end:
                raise ValueError(f'{name} has {size:,} bytes where it lists {end:,}')

    def common(self) -> dict[str, Any]:
        """The plain state: arguments, iteration.

        Raises:
            ValueError: there is none, or it is damaged, or more than plain values.
        """
        file = self.folder / COMMON_FILE
        if file.is_file():
            check_archive(file)
            common = plain_load(file)
        elif COMMON in self.entries:
            name = f'{self.folder}: its common state'
            common = plain_load(io.BytesIO(self.read(COMMON)), name)
            common = common[0] if isinstance(common, list) and common else common
        else:
            raise ValueError(
                f'{self.folder} has neither {COMMON_FILE} nor a common state: it is no checkpoint '
                'of Megatron-Core'
            )
        if not isinstance(common, dict):
            raise ValueError(
                f'{self.folder}: its common state is a {type(common).__name__} where a dictionary '
                'was expected: it is no checkpoint of Megatron-Core'
            )
        return common

    def read(self, name: str, offsets: tuple[int, ...] | None = None) -> bytes:
        """The bytes of an opaque state, or of the part of a tensor that begins at ``offsets``.

        Raises:
            ValueError: they are damaged, or of a form that Megatron does not write.
        """
        with one_line(f'{self.folder}: {name}'):
            index = MetadataIndex(name, None if offsets is None else torch.Size(offsets))
            place = self.places[index]
            if getattr(place, 'transform_descriptors', None):
                raise ValueError('it was written through an extension, such as compression')
            with (self.folder / place.relative_path).open('rb') as file:
                file.seek(place.offset)
                data: bytes = file.read(place.length)
        check_archive(io.BytesIO(data), f'{self.folder}: {name}')
        return data

    def tensor(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """One part of a tensor, which must be what ``.metadata`` says of it.

        Raises:
            ValueError: it is not, or is damaged.
        """
        where = f'{self.folder}: {name}'
        value = plain_load(io.BytesIO(self.read(name, offsets)), where)
        if not isinstance(value, Tensor):
            raise ValueError(f'{where} is stored as a {type(value).__name__}, not as a tensor')
        if tuple(value.shape) != tuple(sizes) or value.dtype != dtype:
            raise ValueError(
                f'{where} is stored as {value.dtype} {list(value.shape)} where {METADATA_FILE} '
                f'says {dtype} {list(sizes)}: the two do not belong together; take another copy'
            )
        return value
