"""Write a checkpoint that appears whole or not at all, one piece of a tensor at a time."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_mhc.checkpoints.files import CONFIG_FILE, RELEASE, TRACKER
from megatron_mhc.checkpoints.plain import without_group_warning
from megatron_mhc.checkpoints.stored import COMMON_FILE
from megatron_mhc.convert.source import (
    CONFIG,
    INDEX,
    RUN_CONFIG,
    SCALARS,
    TORCH_FILE,
    Chunk,
    Entry,
    Source,
    require,
    whole,
)

SHARD_BYTES = 4 << 30
# What tensors of weights have, as the format calls it.
SAFETENSORS = {
    torch.float64: 'F64',
    torch.float32: 'F32',
    torch.bfloat16: 'BF16',
    torch.float16: 'F16',
    torch.float8_e4m3fn: 'F8_E4M3',
    torch.float8_e5m2: 'F8_E5M2',
    torch.int64: 'I64',
    torch.int32: 'I32',
    torch.int16: 'I16',
    torch.int8: 'I8',
    torch.uint8: 'U8',
    torch.bool: 'BOOL',
}


class Written(Protocol):
    """What the functions here ask of the content of a checkpoint."""

    common: dict[str, Any]

    def entries(self) -> dict[str, Entry]: ...

    def chunk(self, name: str, chunk: Chunk) -> Tensor: ...

    def value(self, name: str) -> Tensor | io.BytesIO | None: ...


@dataclasses.dataclass
class Content:
    """What a checkpoint is to hold: tensors of the source under their names, and new ones.

    Args:
        source: whose tensors are carried; carried: their names.
        new: name -> tensor; common: plain state, with the arguments.
        advance: told of the bytes written.
    """

    source: Source
    carried: list[str]
    new: dict[str, Tensor]
    common: dict[str, Any]
    advance: Callable[[int], Any] = lambda count: None

    def entries(self) -> dict[str, Entry]:
        carried = {name: self.source.entries[name] for name in self.carried}
        return carried | {name: whole(value) for name, value in self.new.items()}

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        value = self.new[name] if name in self.new else self.source.chunk(name, chunk)
        self.advance(value.nbytes)
        return value

    def value(self, name: str) -> Tensor | io.BytesIO | None:
        """A whole tensor, or an opaque state."""
        if name not in self.new and self.source.entries[name].shape is None:
            return self.source.opaque(name)
        value = self.new[name] if name in self.new else self.source.tensor(name)
        self.advance(value.nbytes)
        return value

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries().values())


class _ByChunk(DefaultSavePlanner):
    """Saves in the pieces that the source has, each read when it is its turn."""

    def __init__(self, content: Written) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.content = content

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, (shape, dtype, chunks) in self.content.entries().items():
            if shape is None or dtype is None:
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            for chunk in chunks:
                offsets, sizes = map(torch.Size, chunk)
                data = TensorWriteData(
                    ChunkStorageMetadata(offsets, sizes),
                    TensorProperties(dtype=dtype),
                    torch.Size(shape),
                )
                index = MetadataIndex(name, offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            opaque = self.content.value(name)
            assert opaque is not None
            return opaque
        assert write_item.tensor_data is not None
        part = write_item.tensor_data.chunk
        value = self.content.chunk(name, Chunk(tuple(part.offsets), tuple(part.sizes)))
        # A view, of a mapped file or of all layers, would be saved with all that is behind it.
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _place(root: pathlib.Path, iteration: int | None) -> pathlib.Path:
    """A new folder for an iteration, a release where there is none, with the tracker file."""
    folder = root / (RELEASE if iteration is None else f'iter_{iteration:07d}')
    folder.mkdir()
    (root / TRACKER).write_text(RELEASE if iteration is None else str(iteration))
    return folder


def write_distributed(root: pathlib.Path, content: Written, iteration: int | None = None) -> None:
    """A ``torch_dist`` checkpoint; with ``common.pt``, as every supported release reads it.

    Args:
        iteration: None makes it a release.
    """
    folder = _place(root, iteration)
    try:
        with without_group_warning():
            writer = FileSystemWriter(folder)
            save({}, storage_writer=writer, planner=_ByChunk(content), no_dist=True)
    except CheckpointException as error:
        # Of all ranks, in several paragraphs; there is one.
        raise next(iter(error.failures.values()))[0] from None
    torch.save(content.common, folder / COMMON_FILE)
    (folder / CONFIG_FILE).write_text(
        json.dumps({'sharded_backend': 'torch_dist', 'sharded_backend_version': 1})
    )


def write_run_config(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """What megatron-bridge 0.6 reads of an iteration in place of arguments, from plain values.

    Its release of Megatron takes the model from ``model``, and one rank's files from the rest.
    """
    yaml = require('pyyaml', 'yaml')
    model = {name: value for name, value in vars(args).items() if type(value) in SCALARS}
    model |= {f'{kind}_model_parallel_size': 1 for kind in ('tensor', 'pipeline')}
    saved = {'save_optim': False, 'save_rng': False, 'fully_parallel_save': False}
    text = yaml.safe_dump({'model': model, 'checkpoint': saved})
    (folder / RUN_CONFIG).write_text(text)


def write_file(root: pathlib.Path, content: Written, iteration: int | None = None) -> None:
    """A ``torch`` checkpoint of one rank, held in memory as a whole."""
    file = _place(root, iteration) / TORCH_FILE
    file.parent.mkdir()
    model = {name: content.value(name) for name in content.entries()}
    torch.save({**content.common, 'model': model}, file)


def write_safetensors(root: pathlib.Path, content: Content, config: dict[str, Any]) -> None:
    """A folder of safetensors, at most 4 GB each where tensors allow it, with their index.

    Megatron's arguments lie beside them, so that the way back finds them.
    """
    write_shards(root, content.entries(), lambda name: _as_tensor(content.value(name)))
    (root / CONFIG).write_text(json.dumps(config, indent=2))
    torch.save(content.common, root / COMMON_FILE)


def write_shards(
    root: pathlib.Path, entries: dict[str, Entry], value: Callable[[str], Tensor]
) -> None:
    """Safetensors of ``SHARD_BYTES`` at most, where tensors allow it, with their index."""
    hub = require('huggingface_hub', 'huggingface_hub')
    split = hub.split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern='model{suffix}.safetensors',
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        _write_shard(root / file, {name: entries[name] for name in names}, value)
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        (root / INDEX).write_text(json.dumps(index, indent=2))


def _write_shard(
    path: pathlib.Path, entries: dict[str, Entry], value: Callable[[str], Tensor]
) -> None:
    """One file of safetensors, of which one tensor at a time is in memory.

    The library writes what it has as a whole. The format: the length of the header in eight bytes,
    the header, a JSON object padded to eight, and the tensors one after the other, here widest
    dtypes first, so that each is aligned (https://github.com/huggingface/safetensors#format).
    """
    # How long opaque states are is known once they are read; they are a few bytes.
    opaque = {name: value(name) for name, entry in entries.items() if entry.shape is None}
    entries = entries | {name: whole(read) for name, read in opaque.items()}
    order = sorted(entries, key=lambda name: -_dtype(entries[name]).itemsize)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name in order:
        entry, start = entries[name], end
        end += entry.nbytes
        kind = SAFETENSORS[_dtype(entry)]
        header[name] = {'dtype': kind, 'shape': entry.shape, 'data_offsets': (start, end)}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name in order:
            read = opaque[name] if name in opaque else value(name)
            assert whole(read)[:2] == entries[name][:2], name
            file.write(memoryview(read.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _dtype(entry: Entry) -> torch.dtype:
    assert entry.dtype is not None
    return entry.dtype


def _as_tensor(value: Tensor | io.BytesIO | None) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    data = b'' if value is None else value.getvalue()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)


def check_destination(path: pathlib.Path, source: pathlib.Path, overwrite: bool) -> None:
    """Raise ValueError unless ``path`` may be written, and replaced if it is there."""
    own, other = path.resolve(), source.resolve()
    if own == other or own in other.parents or other in own.parents:
        raise ValueError(f'DST {path}: it and SRC {source} lie within each other; choose another')
    if not path.parent.is_dir():
        raise ValueError(f'DST {path}: there is no folder {path.parent} to write it to')
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise ValueError(f'DST {path} exists; choose another, or add --overwrite')
    if not path.is_dir():
        raise ValueError(f'DST {path} exists and is a file, so it stays; choose another')
    if not any((path / name).exists() for name in (TRACKER, CONFIG)):
        raise ValueError(f'DST {path} exists and is no checkpoint, so it stays; choose another')


@contextlib.contextmanager
def atomic_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside ``path`` that takes its place when the block ends well, and else is gone."""
    made = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}-', dir=path.parent))
    new, old = made / 'new', made / 'old'
    try:
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(made, ignore_errors=True)
