"""Read a checkpoint offline: one process, no process group, one piece of a tensor at a time.

Opaque states of modules (``_extra_state``) are carried as bytes and never opened.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import pathlib
import zipfile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mhc.checkpoints.files import RANK_FILES, TRACKER, format_of, iteration_folder
from megatron_mhc.checkpoints.plain import check_archive, one_line, plain_load
from megatron_mhc.checkpoints.stored import COMMON_FILE, Stored
from megatron_mhc.convert.layouts import LAYOUTS, SINKHORN, StoredLayout

# What belongs to a run, not to a model.
RUN_STATE = ('optimizer.', 'chained_', 'rng_state', 'rerun_state_machine_state', 'common_state')
TORCH_FILE = 'mp_rank_00/model_optim_rng.pt'
# The configuration of another project, kept where its format has no place for it.
THEIRS = 'source_config'
# Of the common state, what describes the weights.
KEPT = ('args', 'checkpoint_version', 'content_metadata', THEIRS)
CONFIG = 'config.json'
MODEL = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# Which of ``LAYOUTS`` it is, in a configuration that we wrote.
LAYOUT = 'mhc_layout'
# Of a megatron-bridge run, in place of arguments among its plain state.
RUN_CONFIG = 'run_config.yaml'
# Megatron's argument -> what DeepSeek-V4's configuration, and those after it, call it.
SHAPE = {
    'num_layers': 'num_hidden_layers',
    'hidden_size': 'hidden_size',
    'num_residual_streams': 'hc_mult',
    'mhc_sinkhorn_iterations': 'hc_sinkhorn_iters',
}
SCALARS = (str, bool, int, float, type(None))
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
        if self.shape is None or self.dtype is None:
            return 0
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
        config: of ``safetensors`` alone, its ``config.json``; layout: what that names.
        args: the arguments of the run that saved it.
        state: its plain state; common: of that what describes the weights, ``args`` among it.
        entries: name -> ``Entry`` of all that belongs to the model, in the file's order.
        run: the same of the run: optimizer, random states.
        left_out: number of entries of the run, with those of ``state``.
    """

    format: str
    config: dict[str, Any]
    layout: StoredLayout

    def __init__(self, folder: pathlib.Path, common: dict[str, Any]) -> None:
        self.folder = folder
        if not isinstance(common, dict):
            raise ValueError(
                f'{folder} holds a {type(common).__name__}: it is no checkpoint of Megatron-Core'
            )
        args = common.get('args')
        if not isinstance(args, argparse.Namespace):
            raise ValueError(
                f'{folder} has no saved arguments, without which its model cannot be told; save it '
                'with megatron.training'
            )
        self.args = args
        self.state = common
        self.common = {name: common[name] for name in KEPT if name in common}
        self.entries: dict[str, Entry] = {}
        self.run: dict[str, Entry] = {}
        self.left_out = 0

    def entry(self, name: str) -> Entry:
        """Of the model or of the run."""
        return self.entries[name] if name in self.entries else self.run[name]

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """One stored part of a tensor."""
        raise NotImplementedError

    def opaque(self, name: str) -> io.BytesIO | None:
        """An opaque state as it is stored."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, whose parts ``complete.check_parts`` has looked at.

        Raises:
            ValueError: it is missing.
        """
        entry = self.entries.get(name) or self.run.get(name)
        if entry is None or entry.shape is None:
            raise ValueError(
                f'{self.folder}: {name} is missing, which the saved arguments call for; the '
                'checkpoint is of another layout (--from) or not whole'
            )
        value = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            part = zip(chunk.offsets, chunk.sizes, strict=True)
            value[tuple(slice(start, start + size) for start, size in part)] = self.chunk(
                name, chunk
            )
        return value

    def layer(self, name: str, number: int) -> Tensor:
        """Layer ``number`` of a tensor ``[L, ...]`` of all layers; no other one is read."""
        shape, dtype, chunks = self.entries[name]
        assert shape is not None
        value = torch.empty(shape[1:], dtype=dtype)
        for chunk in chunks:
            (first, *offsets), (count, *sizes) = chunk
            if first <= number < first + count:
                part = zip(offsets, sizes, strict=True)
                where = tuple(slice(start, start + size) for start, size in part)
                value[where] = self.chunk(name, chunk)[number - first]
        return value


class DistributedSource(Source):
    """A ``torch_dist`` checkpoint, whatever layout wrote it."""

    format = 'torch_dist'

    def __init__(self, folder: pathlib.Path) -> None:
        self.stored = Stored(folder)
        common = self.stored.common()
        if 'args' not in common and (folder / RUN_CONFIG).is_file():
            common['args'] = _run_config_args(folder / RUN_CONFIG)
        super().__init__(folder, common)
        for name, entry in self.stored.entries.items():
            own = self.run if name.startswith(RUN_STATE) else self.entries
            if isinstance(entry, TensorStorageMetadata):
                with one_line(f'{folder}: {name}'):
                    chunks = tuple(Chunk(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
                    own[name] = Entry(tuple(entry.size), entry.properties.dtype, chunks)
            else:
                own[name] = Entry(None, None)
        self.left_out = len(self.run)

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        dtype = self.entry(name).dtype
        assert dtype is not None
        return self.stored.tensor(name, *chunk, dtype)

    def opaque(self, name: str) -> io.BytesIO:
        return io.BytesIO(self.stored.read(name))


class FileSource(Source):
    """A ``torch`` checkpoint of one file: one rank of tensor and pipeline parallelism."""

    format = 'torch'

    def __init__(self, folder: pathlib.Path) -> None:
        files = sorted(folder.glob(RANK_FILES))
        if files != [folder / TORCH_FILE]:
            raise ValueError(
                f'{folder} is split over {len(files)} files by tensor or pipeline parallelism; '
                'save it in the distributed format first, with '
                '--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER'
            )
        check_archive(files[0])
        state = plain_load(files[0], mmap=zipfile.is_zipfile(files[0]))
        super().__init__(folder, state)
        self.state = {name: value for name, value in state.items() if name != 'model'}
        if not isinstance(state.get('model'), dict):
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
        with one_line(f'{folder / CONFIG}'):
            self.config = json.loads((folder / CONFIG).read_text())
            model = model_config(self.config)
        self.layout = _layout_named(folder, model)
        with one_line(f'{folder / CONFIG}'):
            shape = dict(SHAPE)
            if self.layout.manifold != SINKHORN:
                del shape['mhc_sinkhorn_iterations']
            args = {ours: model[name] for ours, name in shape.items()}
        common = {'args': argparse.Namespace(**args), THEIRS: self.config}
        if (folder / COMMON_FILE).is_file():
            check_archive(folder / COMMON_FILE)
            common = plain_load(folder / COMMON_FILE)
        super().__init__(folder, common)
        self.files = {
            self.layout.own_name(name): tensor for name, tensor in open_tensors(folder).items()
        }
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


def open_tensors(folder: pathlib.Path) -> dict[str, tuple[Any, str]]:
    """Name -> the file of safetensors that has it, mapped into memory, and the name once more."""
    safetensors = require('safetensors', 'safetensors')
    names = [MODEL]
    # transformers takes the one file where both are there.
    if (folder / INDEX).is_file() and not (folder / MODEL).is_file():
        with one_line(f'{folder / INDEX}'):
            index = json.loads((folder / INDEX).read_text())
            names = sorted(set(index['weight_map'].values()))
    found = {}
    for name in names:
        with one_line(f'{folder / str(name)}', safetensors.SafetensorError):
            file = safetensors.safe_open(folder / name, framework='pt')
            found.update({stored: (file, stored) for stored in file.keys()})
    return found


def require(package: str, module: str) -> Any:
    """``module`` of ``package``, which nothing but the formats of Hugging Face needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{package} is not installed, which the formats of Hugging Face need; '
            f'pip install {package}'
        ) from error


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of the language model, which may be one part of several."""
    text = config.get('text_config')
    if not isinstance(text, dict):
        return config
    return {**config, **text, 'model_type': config.get('model_type')}


def _layout_named(folder: pathlib.Path, config: dict[str, Any]) -> StoredLayout:
    """One without a type is DeepSeek-V4's, as its own files are.

    Raises:
        ValueError: the layout of such a model is unknown.
    """
    named, kind = config.get(LAYOUT), config.get('model_type')
    for layout in LAYOUTS.values():
        if layout.model_types and (
            named == layout.name or (not named and kind in layout.model_types)
        ):
            return layout
    if named or kind:
        raise ValueError(
            f'{folder}: {LAYOUT if named else "model_type"} {named or kind} in its {CONFIG}: no '
            f'layout of n streams is known by that name; those are {", ".join(_known())}'
        )
    return LAYOUTS['deepseek-v4']


def _known() -> list[str]:
    return [kind for layout in LAYOUTS.values() for kind in layout.model_types]


def _run_config_args(file: pathlib.Path) -> argparse.Namespace:
    """The plain values of a megatron-bridge model, under the names of Megatron's arguments."""
    yaml = require('pyyaml', 'yaml')
    with one_line(str(file), yaml.YAMLError):
        model = yaml.safe_load(file.read_text())['model']
        plain = {name: value for name, value in model.items() if type(value) in SCALARS}
    return argparse.Namespace(**plain)


def has_layout(folder: pathlib.Path) -> bool:
    """Whether ``config.json`` is of a model with n streams, or does not say which it is."""
    with one_line(f'{folder / CONFIG}'):
        config = json.loads((folder / CONFIG).read_text())
        model = model_config(config)
    return SHAPE['num_residual_streams'] in model or 'model_type' not in config


def open_source(path: pathlib.Path, step: int | None = None) -> Source:
    """The checkpoint at ``path``: what ``--load`` names, or the folder of one iteration.

    Raises:
        ValueError: no checkpoint there, one that is cut short, or one with more than plain values.
    """
    if not path.is_dir():
        raise ValueError(f'{path}: no such folder; name what --load would')
    own = iteration_folder(path, step, 'SRC') or path
    kind = format_of(own)
    if kind == 'torch_dist':
        return DistributedSource(own)
    if kind == 'torch':
        return FileSource(own)
    if (own / CONFIG).is_file():
        from megatron_mhc.convert.hf.source import HuggingFaceSource

        return SafetensorsSource(own) if has_layout(own) else HuggingFaceSource(own)
    raise ValueError(
        f'{own} is no checkpoint that is read: it has neither metadata.json (torch_dist) nor '
        f'{TORCH_FILE} (torch) nor {CONFIG} (safetensors); name a folder with {TRACKER}, or one '
        'iteration of it'
    )
