"""Read a checkpoint offline: one process, no process group, one piece of a tensor at a time.

Opaque states of modules (``_extra_state``) are carried as bytes and never opened.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_mhc.checkpoint import TRACKER, iteration_folder
from megatron_mhc.convert.plain import load_metadata, one_line, plain_load

# What belongs to a run, not to a model.
RUN_STATE = ('optimizer.', 'chained_', 'rng_state', 'rerun_state_machine_state', 'common_state')
COMMON = 'common_state/shard_0_1'
COMMON_FILE = 'common.pt'
TORCH_FILE = 'mp_rank_00/model_optim_rng.pt'
# Of the common state, what describes the weights.
KEPT = ('args', 'checkpoint_version', 'content_metadata')
CONFIG = 'config.json'
MODEL = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# Megatron's argument -> what DeepSeek-V4's configuration calls it.
SHAPE = {
    'num_layers': 'num_hidden_layers',
    'hidden_size': 'hidden_size',
    'num_residual_streams': 'hc_mult',
    'mhc_sinkhorn_iterations': 'hc_sinkhorn_iters',
}
# Before mapping parameters that transformers saved; DeepSeek's own files have it not.
PREFIX = re.compile(r'^model\.(?=(layers\.\d+\.)?hc_)')
# Opaque states, which safetensors keep as bytes.
OPAQUE = '_extra_state'


class Chunk(NamedTuple):
    """A stored part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Entry(NamedTuple):
    """A stored tensor and its parts; opaque bytes have no shape and no dtype."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    chunks: tuple[Chunk, ...] = ()

    @property
    def nbytes(self) -> int:
        return 0 if self.shape is None else torch.Size(self.shape).numel() * self.dtype.itemsize


def whole(value: object) -> Entry:
    """The entry of a tensor in one piece, or of opaque bytes."""
    if not isinstance(value, Tensor):
        return Entry(None, None)
    shape = tuple(value.shape)
    return Entry(shape, value.dtype, (Chunk((0,) * len(shape), shape),))


class Source:
    """A checkpoint on disk, of which nothing but names, shapes and arguments has been read.

    Attributes:
        format: ``torch_dist``, ``torch`` or ``safetensors``.
        args: the arguments of the run that saved it.
        common: of its plain state, what describes the weights, ``args`` among it.
        entries: name -> ``Entry`` of all that belongs to the model, in the file's order.
        left_out: number of entries of the run: optimizer, random states.
    """

    format: str

    def __init__(self, folder: pathlib.Path, common: dict[str, Any]) -> None:
        self.folder = folder
        self.args = common.get('args')
        if not isinstance(self.args, argparse.Namespace):
            raise ValueError(
                f'{folder} has no saved arguments, without which its model cannot be told; save it '
                'with megatron.training'
            )
        self.common = {name: common[name] for name in KEPT if name in common}
        self.entries: dict[str, Entry] = {}
        self.left_out = 0

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """One stored part of a tensor."""
        raise NotImplementedError

    def opaque(self, name: str) -> io.BytesIO | None:
        """An opaque state as it is stored."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            ValueError: it is missing, or parts of it are.
        """
        entry = self.entries.get(name)
        if entry is None or entry.shape is None:
            raise ValueError(
                f'{self.folder}: {name} is missing, which the saved arguments call for; the '
                'checkpoint is of another layout (--from) or not whole'
            )
        value = torch.empty(entry.shape, dtype=entry.dtype)
        if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != value.numel():
            raise ValueError(f'{self.folder}: parts of {name} are missing; take another copy')
        for chunk in entry.chunks:
            part = zip(chunk.offsets, chunk.sizes, strict=True)
            value[tuple(slice(start, start + size) for start, size in part)] = self.chunk(
                name, chunk
            )
        return value


class DistributedSource(Source):
    """A ``torch_dist`` checkpoint, whatever layout wrote it."""

    format = 'torch_dist'

    def __init__(self, folder: pathlib.Path) -> None:
        metadata = load_metadata(folder / '.metadata')
        self.folder = folder
        self.reader = FileSystemReader(folder)
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata
        if (folder / COMMON_FILE).is_file():
            common = plain_load(folder / COMMON_FILE)
        elif COMMON in stored:
            common = plain_load(self.opaque(COMMON), f'{folder}: its common state')[0]
        else:
            raise ValueError(
                f'{folder} has neither {COMMON_FILE} nor a common state: it is no checkpoint of '
                'Megatron-Core'
            )
        super().__init__(folder, common)
        for name, entry in stored.items():
            if name.startswith(RUN_STATE):
                self.left_out += 1
            elif isinstance(entry, TensorStorageMetadata):
                chunks = tuple(Chunk(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
                self.entries[name] = Entry(tuple(entry.size), entry.properties.dtype, chunks)
            else:
                self.entries[name] = Entry(None, None)

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        value = torch.empty(chunk.sizes, dtype=self.entries[name].dtype)
        self._read(name, LoadItemType.TENSOR, value, chunk)
        return value

    def opaque(self, name: str) -> io.BytesIO:
        value = io.BytesIO()
        self._read(name, LoadItemType.BYTE_IO, value)
        value.seek(0)
        return value

    def _read(
        self, name: str, kind: LoadItemType, into: Tensor | io.BytesIO, chunk: Chunk | None = None
    ) -> None:
        offsets, sizes = (torch.Size(part) for part in chunk or ((), ()))
        index = MetadataIndex(name, None if chunk is None else offsets)
        start = torch.Size([0] * len(sizes))
        item = ReadItem(kind, index, start, index, start, sizes)
        with one_line(f'{self.folder}: {name}'):
            self.reader.read_data(LoadPlan([item]), _Into(into)).wait()


class _Into:
    """The part of ``LoadPlanner`` that a reader calls, for one tensor or opaque state.

    torch's own planner would unpickle the opaque ones.
    """

    def __init__(self, target: Tensor | io.BytesIO) -> None:
        self.target = target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.target.write(value.getbuffer())

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class FileSource(Source):
    """A ``torch`` checkpoint of one file: one rank of tensor and pipeline parallelism."""

    format = 'torch'

    def __init__(self, folder: pathlib.Path) -> None:
        files = sorted(folder.glob('mp_rank_*/model_optim_rng.pt'))
        if files != [folder / TORCH_FILE]:
            raise ValueError(
                f'{folder} is split over {len(files)} files by tensor or pipeline parallelism; '
                'save it in the distributed format first, with '
                '--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER'
            )
        state = plain_load(files[0], mmap=True)
        super().__init__(folder, state)
        if 'model' not in state:
            raise ValueError(
                f'{files[0]} has no "model": virtual pipeline stages are saved apart; save it with '
                '--ckpt-format torch_dist'
            )
        self.left_out = len(state.keys() - {'model', *KEPT})
        self.model = state['model']
        self.entries = {name: whole(value) for name, value in self.model.items()}

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        return self.model[name]

    def opaque(self, name: str) -> io.BytesIO | None:
        return self.model[name]


class SafetensorsSource(Source):
    """A folder of safetensors with ``config.json``, as Hugging Face has it.

    What ``megatron-mhc convert`` wrote has Megatron's arguments beside it; those of another one are
    as few as its configuration tells.
    """

    format = 'safetensors'

    def __init__(self, folder: pathlib.Path) -> None:
        safetensors = require_safetensors()
        with one_line(f'{folder / CONFIG}'):
            self.config = json.loads((folder / CONFIG).read_text())
            args = {ours: self.config[name] for ours, name in SHAPE.items()}
        common = {'args': argparse.Namespace(**args)}
        if (folder / COMMON_FILE).is_file():
            common = plain_load(folder / COMMON_FILE)
        super().__init__(folder, common)
        names = {MODEL}
        if (folder / INDEX).is_file():
            with one_line(f'{folder / INDEX}'):
                names = set(json.loads((folder / INDEX).read_text())['weight_map'].values())
        self.files = {}
        for name in sorted(names):
            with one_line(f'{folder / name}', safetensors.SafetensorError):
                file = safetensors.safe_open(folder / name, framework='pt')
                for stored in file.keys():
                    self.files[PREFIX.sub('', stored)] = file, stored
        for name in self.files:
            # Mapped into memory, not read.
            self.entries[name] = whole(None if OPAQUE in name else self._get(name))

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        return self._get(name)

    def opaque(self, name: str) -> io.BytesIO:
        return io.BytesIO(self._get(name).numpy().tobytes())

    def _get(self, name: str) -> Tensor:
        file, stored = self.files[name]
        return file.get_tensor(stored)


def require_safetensors() -> Any:
    """The module, which nothing else of ours needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ValueError(
            'safetensors is not installed, the format of DeepSeek-V4; pip install safetensors'
        ) from error
    return safetensors


def open_source(path: pathlib.Path, step: int | None = None) -> Source:
    """The checkpoint at ``path``: what ``--load`` names, or the folder of one iteration.

    Raises:
        ValueError: no checkpoint there, one that is cut short, or one with more than plain values.
    """
    if not path.is_dir():
        raise ValueError(f'{path}: no such folder; name what --load would')
    own = iteration_folder(path, step) if step or (path / TRACKER).is_file() else path
    if (own / 'metadata.json').is_file():
        return DistributedSource(own)
    if any(own.glob('mp_rank_*/model_optim_rng.pt')):
        return FileSource(own)
    if (own / CONFIG).is_file():
        return SafetensorsSource(own)
    raise ValueError(
        f'{own} is no checkpoint that is read: it has neither metadata.json (torch_dist) nor '
        f'{TORCH_FILE} (torch) nor {CONFIG} (safetensors); name a folder with {TRACKER}, or one '
        'iteration of it'
    )
