"""A folder of transformers' as a checkpoint of Megatron's: its names, its arguments."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoints.plain import one_line
from megatron_mhc.convert.hf.config import AUTO_MAP, METADATA, MODEL_TYPE, fill_args
from megatron_mhc.convert.hf.names import (
    EXPERTS,
    LAYERS,
    Config,
    Row,
    all_rows,
    our_names,
    stateful_modules,
)
from megatron_mhc.convert.hf.native import KINDS, from_native
from megatron_mhc.convert.source import (
    CONFIG,
    INDEX,
    MODEL,
    OPAQUE,
    Chunk,
    Entry,
    Source,
    open_tensors,
)

# Of Megatron-Core's own checkpoints: equal layers in one tensor.
STACKED = {'singleton_local_shards': False, 'chained_optim_avoid_prefix': True}
DTYPES = {'F32': torch.float32, 'BF16': torch.bfloat16, 'F16': torch.float16}
HEAD = 'lm_head.weight'
EMBEDDING = 'embedding.word_embeddings.weight'


class HuggingFaceSource(Source):
    """Weights that we exported, or a Llama, a Qwen2 or a Qwen3 of anybody's.

    Raises:
        ValueError: it is another model, has other code, or a tensor is missing or too many.
    """

    format = 'hf'

    def __init__(self, folder: pathlib.Path) -> None:
        written = _read_config(folder)
        self.config = _own_config(folder, written)
        args = _default_args()
        with _told(folder):
            fill_args(args, self.config)
        metadata = written.get(METADATA, STACKED)
        super().__init__(
            folder, {'args': args, 'checkpoint_version': 3.0, 'content_metadata': metadata}
        )
        if not any((folder / name).is_file() for name in (MODEL, INDEX)):
            raise ValueError(
                f'{folder} has neither {MODEL} nor {INDEX}, and pickles are not read; save it with '
                'safe_serialization=True'
            )
        self.files = open_tensors(folder)
        apart = any(metadata.get(n) for n in ('singleton_local_shards', 'non_homogeneous_layers'))
        # Layers of two kinds are never in one tensor.
        stacked = not apart and len({*self.config['expert_layers']}) < 2
        self.parts: dict[tuple[str, int | None], tuple[Row, list[str]]] = {}
        with _told(folder):
            for layer, row in all_rows(self.config):
                self._add(row, layer, stacked)
        ends = self.config['vocab_size'], self.config['hidden_size']
        if self.entries[EMBEDDING].shape != ends:
            raise ValueError(
                f'{folder}: the embedding has shape {list(self.entries[EMBEDDING].shape or ())}, '
                f'where {CONFIG} says {list(ends)}; take another copy'
            )
        self._add_states(stacked)
        used = {name for _, names in self.parts.values() for name in names}
        used |= {HEAD} if self.config['tie_word_embeddings'] else set()
        if strange := sorted(self.files.keys() - used):
            raise ValueError(
                f'{folder}: {strange[0]} is no tensor of the model that {CONFIG} describes'
                f'{f", nor are {len(strange) - 1} others" if strange[1:] else ""}; take another'
            )

    def _add_states(self, stacked: bool) -> None:
        """Empty ones, without which no release of Megatron's loads a distributed checkpoint."""
        depth = self.config['num_hidden_layers']
        for layer in (None, *range(depth)):
            prefix = '' if layer is None else LAYERS if stacked else f'{LAYERS}{layer}.'
            place = (0, 1) if layer is None or not stacked else (layer, depth)
            for module in stateful_modules(self.config, layer):
                for shard in self._shards(module, *place):
                    self.entries[f'{prefix}{module}.{OPAQUE}/shard_{shard}'] = Entry(None, None)

    def _shards(self, module: str, first: int, count: int) -> list[str]:
        """As Megatron numbers them: by layer where all are in one tensor, and by expert."""
        if not module.startswith(EXPERTS):
            return [f'{first}_{count}']
        experts = self.config['num_experts']
        if count == 1:
            return [f'{expert}_{experts}' for expert in range(experts)]
        return [f'{first}.{expert}_{count}.{experts}' for expert in range(experts)]

    def _add(self, row: Row, layer: int | None, stacked: bool) -> None:
        names = our_names(row, layer)
        if missing := [name for name in names if name not in self.files]:
            raise ValueError(
                f'{self.folder}: {missing[0]} is missing, which {CONFIG} calls for; take another '
                'copy'
            )
        try:
            whole = row.kind.join([self._shape(name) for name in names], self.config)
        except RuntimeError:
            raise ValueError(
                f'{self.folder}: the shape of {names[0]} is none that {CONFIG} describes; take '
                'another copy'
            ) from None
        shape, dtype = tuple(whole.shape), whole.dtype
        if layer is None or not stacked:
            name = row.megatron if layer is None else f'{LAYERS}{layer}.{row.megatron}'
            self.parts[name, None] = row, names
            self.entries[name] = Entry(shape, dtype, (Chunk((0,) * len(shape), shape),))
            return
        name = LAYERS + row.megatron
        self.parts[name, layer] = row, names
        before = self.entries.get(name, Entry((0, *shape), dtype))
        if before.shape is None or before.shape[1:] != shape or before.dtype != dtype:
            raise ValueError(
                f'{self.folder}: {names[0]} has another shape or dtype than in the layers before '
                'it; take another copy'
            )
        chunk = Chunk((layer, *(0,) * len(shape)), (1, *shape))
        self.entries[name] = Entry((layer + 1, *shape), dtype, (*before.chunks, chunk))

    def _shape(self, name: str) -> Tensor:
        file, _ = self.files[name]
        view = file.get_slice(name)
        dtype = DTYPES.get(view.get_dtype())
        if dtype is None:
            raise ValueError(
                f'{self.folder}: {name} is stored as {view.get_dtype()}; save it in fp32, bf16 or '
                'fp16'
            )
        return torch.empty(view.get_shape(), dtype=dtype, device='meta')

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        layer = chunk.offsets[0] if (name, None) not in self.parts else None
        row, names = self.parts[name, layer]
        value = row.kind.join([self.files[n][0].get_tensor(n) for n in names], self.config)
        return value if layer is None else value[None]

    def opaque(self, name: str) -> io.BytesIO:
        """The state of a module that has none, as Megatron saves it."""
        empty = io.BytesIO()
        torch.save([None], empty)
        return empty


def _read_config(folder: pathlib.Path) -> Config:
    with one_line(f'{folder / CONFIG}'):
        written = json.loads((folder / CONFIG).read_text())
        if not isinstance(written, dict):
            raise TypeError(f'{type(written).__name__} where an object is wanted')
    return written


def _own_config(folder: pathlib.Path, written: dict[str, Any]) -> Config:
    model_type, auto_map = written.get('model_type'), written.get('auto_map')
    if auto_map not in (None, AUTO_MAP):
        raise ValueError(
            f'{folder}: {CONFIG} has an auto_map of other code than ours ({auto_map}), so nothing '
            'tells what its weights compute; only what --to hf wrote has one that is read'
        )
    with one_line(f'{folder / CONFIG}'):
        config = dict(written) if model_type == MODEL_TYPE else from_native(written)
    if config is None:
        raise ValueError(
            f'{folder}: model_type {model_type} is none that is read; those are '
            f'{", ".join((MODEL_TYPE, *KINDS))}'
        )
    return config


@contextlib.contextmanager
def _told(folder: pathlib.Path) -> Iterator[None]:
    """A value that the configuration lacks, or has of another kind, as one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f'{folder}: {CONFIG} lacks a value, or has one of another kind '
            f'({type(error).__name__}: {error}); take another copy'
        ) from error


def _default_args() -> argparse.Namespace:
    """Megatron's arguments where none is given."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    args: argparse.Namespace = add_megatron_arguments(parser).parse_args([])
    return args
