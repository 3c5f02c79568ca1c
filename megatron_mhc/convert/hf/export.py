"""``megatron-mhc convert SRC DST --to hf``: a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.convert.complete import check_parts, stored_name
from megatron_mhc.convert.conversion import Progress, silent
from megatron_mhc.convert.hf.config import (
    AUTO_MAP,
    METADATA,
    MODEL_TYPE,
    MODELING,
    config_from_args,
)
from megatron_mhc.convert.hf.names import (
    EXPERTS,
    LAYERS,
    OTHERS,
    Config,
    Row,
    all_rows,
    one_by_one,
    our_names,
)
from megatron_mhc.convert.hf.native import as_native
from megatron_mhc.convert.hf.tokenizer import write_tokenizer
from megatron_mhc.convert.output import atomic_folder, check_destination, write_shards
from megatron_mhc.convert.source import (
    CONFIG,
    OPAQUE,
    Entry,
    Source,
    open_source,
    require,
    whole,
)

PREDICTION = 'mtp.'
GENERATION = 'generation_config.json'
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Exported:
    """What an export did, or with ``dry_run`` would do.

    Attributes:
        config: as it is in ``config.json``.
        tensors: their number, and the bytes of all.
        dropped: entries of multi-token prediction, which is left out.
        tokenizer: what became of it, in one line.
        verified: ``difference`` and ``largest`` of the logits, if they were compared.
    """

    config: Config
    tensors: int
    nbytes: int
    dropped: int
    tokenizer: str = ''
    verified: dict[str, float] = field(default_factory=dict)


# A name of the source, and which layer of it where all are in one tensor.
Stored = tuple[str, int | None]


class Piece(NamedTuple):
    """Where a tensor of the output comes from: ``place`` among the parts of ``stored``."""

    stored: str
    layer: int | None
    row: Row
    place: int


def export(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    *,
    step: int | None = None,
    dry_run: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint for transformers; arguments as for ``conversion.convert``.

    A standard model that is a Llama, a Qwen2 or a Qwen3 becomes that; any other one is read with
    ``trust_remote_code=True`` by the modelling file that is written beside it.

    Raises:
        ValueError: something cannot be read, expressed or written; nothing was then written.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    check_destination(destination, source, overwrite)
    opened = open_source(source, step)
    check_parts(opened)
    config = config_from_args(opened.args)
    pieces, entries, dropped = _planned(opened, config)
    nbytes = sum(entry.nbytes for entry in entries.values())
    written = _written_config(opened, config)
    report = Exported(written, len(entries), nbytes, dropped)
    if dry_run:
        return report
    if verify:
        require('transformers', 'transformers')
    with atomic_folder(destination) as folder:
        report.tokenizer, ends = write_tokenizer(opened.args, folder)
        with (progress or silent)(nbytes) as advance:
            write_shards(folder, entries, _reader(opened, config, pieces, advance))
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + '\n')
        if 'auto_map' in written:
            shutil.copy(pathlib.Path(__file__).with_name(f'{MODELING}.py'), folder)
        (folder / GENERATION).write_text(json.dumps(ends, indent=2) + '\n')
        if verify:
            from megatron_mhc.convert.hf.verify import require_equal

            report.verified = require_equal(opened.folder, folder)
    return report


def _written_config(source: Source, config: Config) -> Config:
    own = {'architectures': ['MegatronMhcForCausalLM'], 'auto_map': AUTO_MAP}
    written = as_native(config) or {**own, 'model_type': MODEL_TYPE, **config}
    # Under which names Megatron loads the weights again.
    metadata = source.common.get('content_metadata')
    return written | ({METADATA: metadata} if metadata else {})


def _planned(source: Source, config: Config) -> tuple[dict[str, Piece], dict[str, Entry], int]:
    """What every tensor of the output is made of, and its shape.

    Raises:
        ValueError: a tensor is missing, of another shape or dtype, or has no place in the output.
    """
    pieces: dict[str, Piece] = {}
    entries: dict[str, Entry] = {}
    used = set()
    for layer, row, (stored, number) in _found(source, config):
        entry = source.entries.get(stored)
        if entry is None or entry.shape is None:
            raise ValueError(
                f'{source.folder}: {stored} is missing, which the saved arguments call for; take '
                'another copy or another iteration'
            )
        used.add(stored)
        if source.format == 'torch_dist' and not stored.endswith(row.megatron):
            prefix = LAYERS if number is not None else f'{LAYERS}{layer}.'
            config.setdefault(OTHERS, {})[row.megatron] = stored.removeprefix(prefix)
        if entry.dtype not in FLOATS:
            raise ValueError(
                f'{source.folder}: {stored} is stored as {entry.dtype}; save it in fp32, bf16 or '
                'fp16'
            )
        shape = entry.shape if number is None else entry.shape[1:]
        try:
            parts = row.kind.split(torch.empty(shape, dtype=entry.dtype, device='meta'), config)
        except RuntimeError:
            raise _misfit(source, stored, shape) from None
        for place, (name, part) in enumerate(zip(our_names(row, layer), parts, strict=True)):
            pieces[name], entries[name] = Piece(stored, number, row, place), whole(part)
    embedding = entries['model.embed_tokens.weight'].shape
    if embedding is not None and embedding != (config['vocab_size'], config['hidden_size']):
        raise _misfit(source, 'embedding.word_embeddings.weight', embedding)
    rest = [name for name in source.entries if name not in used and OPAQUE not in name]
    strange = [name for name in rest if not name.startswith(PREDICTION)]
    if strange:
        raise ValueError(
            f'{source.folder}: {strange[0]} is no tensor of the model that the saved arguments '
            f'describe{f", nor are {len(strange) - 1} others" if strange[1:] else ""}; the model '
            'written for transformers has no place for it'
        )
    return pieces, entries, len(rest)


def _found(source: Source, config: Config) -> Iterator[tuple[int | None, Row, Stored]]:
    """Every row with where the source has it; experts apart where it has them apart."""
    for layer, row in all_rows(config):
        where = _stored(source, row, layer)
        if row.megatron.startswith(EXPERTS) and where[0] not in source.entries:
            for own in one_by_one(row):
                yield layer, own, _stored(source, own, layer)
        else:
            yield layer, row, where


def _misfit(source: Source, name: str, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f'{source.folder}: {name} has shape {list(shape)}, which the saved arguments do not '
        'describe; the checkpoint and its arguments do not belong together'
    )


def _stored(source: Source, row: Row, layer: int | None) -> Stored:
    """The entry of a row, and which layer of it where all are in one tensor."""
    if layer is None:
        return stored_name(source.entries, row.megatron), None
    stacked = stored_name(source.entries, LAYERS + row.megatron)
    if stacked in source.entries:
        return stacked, layer
    return stored_name(source.entries, f'{LAYERS}{layer}.{row.megatron}'), None


def _reader(
    source: Source, config: Config, pieces: dict[str, Piece], advance: Callable[[int], Any]
) -> Callable[[str], Tensor]:
    """Reads a tensor of the output; parts of one tensor of the source are read together."""
    last: tuple[object, Any] = (None, ())

    def read(name: str) -> Tensor:
        nonlocal last
        stored, layer, row, place = pieces[name]
        if last[0] != (stored, layer):
            value = source.tensor(stored) if layer is None else source.layer(stored, layer)
            last = (stored, layer), row.kind.split(value, config)
        part: Tensor = last[1][place].contiguous()
        advance(part.nbytes)
        return part

    return read
