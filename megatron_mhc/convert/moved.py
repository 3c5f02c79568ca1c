"""A checkpoint under other names, whose tensors are read from the old one when they are written."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.convert.layer_names import STACKED, Part
from megatron_mhc.convert.source import Chunk, Entry, Source


class Moved:
    """What ``output`` writes, in place of ``Content``.

    Args:
        source: of all tensors.
        parts: name -> what it is in ``source``: an entry, a layer of one, or several, one a layer.
        common: plain state, with the arguments.
        empty: names of opaque states that hold nothing.

    Attributes:
        advance: told of the bytes written.
    """

    def __init__(
        self,
        source: Source,
        parts: dict[str, tuple[Part, ...]],
        common: dict[str, Any],
        empty: tuple[str, ...] = (),
    ) -> None:
        self.source, self.parts, self.common, self.empty = source, parts, common, empty
        self.advance: Callable[[int], Any] = lambda count: None
        self._entries = {name: self._entry(own) for name, own in parts.items()}
        self._entries |= dict.fromkeys(empty, Entry(None, None))

    def entries(self) -> dict[str, Entry]:
        return self._entries

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def _entry(self, parts: tuple[Part, ...]) -> Entry:
        first = self.source.entry(parts[0].name)
        if first.shape is None:
            return first
        layer = parts[0].layer
        if layer is None:
            return first
        if layer != STACKED:
            chunks = (Chunk(c.offsets[1:], c.sizes[1:]) for c in first.chunks if _covers(c, layer))
            return Entry(first.shape[1:], first.dtype, tuple(chunks))
        entries = [self.source.entry(part.name) for part in parts]
        for part, entry in zip(parts, entries, strict=True):
            if (entry.shape, entry.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f'{part.name} is {entry.dtype} {entry.shape} where {parts[0].name} is '
                    f'{first.dtype} {first.shape}: layers that are alike in the saved arguments '
                    'differ'
                )
        stacked = tuple(
            Chunk((layer, *chunk.offsets), (1, *chunk.sizes))
            for layer, entry in enumerate(entries)
            for chunk in entry.chunks
        )
        return Entry((len(parts), *first.shape), first.dtype, stacked)

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        value = self._chunk(self.parts[name], chunk)
        self.advance(value.nbytes)
        return value

    def _chunk(self, parts: tuple[Part, ...], chunk: Chunk) -> Tensor:
        if parts[0].layer == STACKED:
            inner = Chunk(chunk.offsets[1:], chunk.sizes[1:])
            return self.source.chunk(parts[chunk.offsets[0]].name, inner).unsqueeze(0)
        name, layer = parts[0]
        if layer is None:
            return self.source.chunk(name, chunk)
        outer = next(
            c
            for c in self.source.entry(name).chunks
            if _covers(c, layer) and (c.offsets[1:], c.sizes[1:]) == chunk
        )
        return self.source.chunk(name, outer)[layer - outer.offsets[0]]

    def value(self, name: str) -> Tensor | io.BytesIO | None:
        """A whole tensor, or an opaque state."""
        if name in self.empty:
            # As Megatron saves what a layer has nothing to say in.
            state = io.BytesIO()
            torch.save([None], state)
            return state
        own = self.parts[name]
        if self._entries[name].shape is None:
            return self.source.opaque(own[0].name)
        value = self.source.tensor(own[0].name)
        self.advance(value.nbytes)
        return value


def _covers(chunk: Chunk, layer: int) -> bool:
    return chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
