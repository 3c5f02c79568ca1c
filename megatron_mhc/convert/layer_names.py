"""Names of weights, and of all that optimizers keep of them, in a GPT model and in a hybrid one.

Layer i of a GPT model is two of the other: 2i with its attention and 2i + 1 with its MLP. Where all
GPT layers are alike, distributed checkpoints have each weight of theirs once, ``[layers, ...]``;
those of a hybrid model never are. Prediction layers are stacks of two such layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

ATTENTION = (
    'input_layernorm.',
    'self_attention.',
    'self_attention_hyper_connection.',
    # Of dense connections, which are otherwise the stack's: one each for a GPT layer.
    'key_layernorm.',
    'value_layernorm.',
)
MLP = ('pre_mlp_layernorm.', 'mlp.', 'mlp_hyper_connection.')
# A norm of its own, and as part of the projection behind it: Transformer Engine fuses them, and
# local layers are saved under the same names.
NORMS = (
    ('input_layernorm.', 'self_attention.linear_qkv.layer_norm_'),
    ('pre_mlp_layernorm.', 'mlp.linear_fc1.layer_norm_'),
)
FUSED_IN_HYBRID = '*-'
LAYER = re.compile(r'(?P<head>|.*\.)decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>[a-z_].*)')
DEPTH = re.compile(
    r'(?P<head>(?:.*\.)?mtp\.layers\.\d+)\.(?P<block>transformer_layer|mtp_model_layer)\.'
    r'(?:layers\.(?P<layer>\d+)\.)?(?P<rest>.*)'
)
# Of an opaque state: where it lies among those of its name.
SHARD = re.compile(r'(?P<name>.*)/shard_(?P<offset>[\d.]+)_(?P<shape>[\d.]+)')
FINAL_NORMS = ('decoder.final_layernorm.', 'decoder.final_norm.')
# A hybrid model saves this, and a GPT model leaves it out; there is nothing in it.
EMPTY = 'output_layer._extra_state'


# Of a part: it is one of those that are stacked.
STACKED = -1


class Part(NamedTuple):
    """What a name stands for: a stored tensor, one layer of it, or one of several to be stacked."""

    name: str
    layer: int | None = None


class Names:
    """Both sets of names of one model.

    Args:
        layers: symbols of the hybrid model, two for each layer of the GPT model.
        distributed: of a distributed checkpoint; else of modules.
        stacked: equal GPT layers are one tensor there.
        fused: whether each norm of the GPT model has its projection's name there, as local layers
            have it; None where those have that do in the hybrid model, as in Transformer Engine.
    """

    def __init__(self, layers: str, distributed: bool, stacked: bool, fused: bool | None) -> None:
        self.layers, self.distributed = layers, distributed
        self.stacked, self.fused = stacked, fused

    def to_hybrid(self, names: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        """Name in the hybrid model -> what it is in the GPT model that has ``names``.

        Raises:
            ValueError: one of them has no place in a hybrid model.
        """
        new: dict[str, tuple[Part, ...]] = {}
        for name in names:
            for target, layer in self._to_hybrid(name):
                new[target] = (Part(name, layer),)
        return new

    def _to_hybrid(self, name: str) -> list[tuple[str, int | None]]:
        if found := DEPTH.fullmatch(name):
            second = self._half(name, found['rest'])
            rest = self._norm(found['rest'], self.layers[-2 + second] in FUSED_IN_HYBRID)
            return [(f'{found["head"]}.mtp_model_layer.layers.{second}.{rest}', None)]
        if not (found := LAYER.fullmatch(name)):
            return [(name.replace(*FINAL_NORMS), None)]
        second, rest = self._half(name, found['rest']), found['rest']
        numbers = [int(found['layer'])] if found['layer'] else range(len(self.layers) // 2)
        if not found['layer'] and (shard := SHARD.fullmatch(rest)):
            offset, *others = shard['offset'].split('.')
            where = '.'.join(others) or '0', '.'.join(shard['shape'].split('.')[1:]) or '1'
            rest, numbers = f'{shard["name"]}/shard_{where[0]}_{where[1]}', [int(offset)]
            return [(self._hybrid_name(found['head'], numbers[0], second, rest), None)]
        return [
            (
                self._hybrid_name(found['head'], number, second, rest),
                None if found['layer'] else number,
            )
            for number in numbers
        ]

    def _hybrid_name(self, head: str, number: int, second: int, rest: str) -> str:
        layer = 2 * number + second
        fused = layer < len(self.layers) and self.layers[layer] in FUSED_IN_HYBRID
        return f'{head}decoder.layers.{layer}.{self._norm(rest, fused)}'

    def to_gpt(self, names: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        """Name in the GPT model -> what it is, or what it is stacked of, in the hybrid model.

        Raises:
            ValueError: one of them has no place in a GPT model, or not all layers have it.
        """
        new: dict[str, list[tuple[int, str]]] = {}
        for name in names:
            if SHARD.sub(r'\g<name>', name).endswith(EMPTY):
                continue
            target, layer = self._to_gpt(name)
            new.setdefault(target, []).append((layer, name))
        count = len(self.layers) // 2
        for parts in new.values():
            if parts[0][0] >= 0 and len(parts) != count:
                absent = next(i for i in range(count) if i not in dict(parts))
                raise ValueError(
                    f'{parts[0][1]}: layer {2 * absent} or {2 * absent + 1} has none, where the '
                    'layers of this pattern are alike'
                )
        return {
            target: tuple(Part(name, None if layer < 0 else STACKED) for layer, name in sorted(own))
            for target, own in new.items()
        }

    def _to_gpt(self, name: str) -> tuple[str, int]:
        """The name, and of what is stacked there the GPT layer; -1 of what is not."""
        if found := DEPTH.fullmatch(name):
            second = self._half(name, found['rest'])
            rest = self._norm(found['rest'], self._is_fused(second - 2))
            block = 'transformer_layer' if self.distributed else 'mtp_model_layer'
            return f'{found["head"]}.{block}.{rest}', -1
        if not (found := LAYER.fullmatch(name)):
            return name.replace(*FINAL_NORMS[::-1]), -1
        layer, second = int(found['layer']), self._half(name, found['rest'])
        if layer >= len(self.layers) or layer % 2 != second:
            raise ValueError(f'{name}: layer {layer} has no such part in pattern {self.layers}')
        rest = self._norm(found['rest'], self._is_fused(layer))
        start = f'{found["head"]}decoder.layers.'
        if not self.stacked:
            return f'{start}{layer // 2}.{rest}', -1
        shard = SHARD.fullmatch(rest)
        if shard is None:
            return start + rest, layer // 2
        # One that lies nowhere in particular is at 0 of 1.
        alone = (shard['offset'], shard['shape']) == ('0', '1')
        offset, shape = str(layer // 2), str(len(self.layers) // 2)
        if not alone:
            offset, shape = f'{offset}.{shard["offset"]}', f'{shape}.{shard["shape"]}'
        return f'{start}{shard["name"]}/shard_{offset}_{shape}', -1

    def _is_fused(self, layer: int) -> bool:
        """In the GPT model, the norm of what is ``layer`` of the hybrid model."""
        return self.layers[layer] in FUSED_IN_HYBRID if self.fused is None else self.fused

    def _half(self, name: str, rest: str) -> int:
        """0 of what belongs to attention, 1 of what belongs to the MLP."""
        for half, starts in enumerate((ATTENTION, MLP)):
            if rest.startswith(starts):
                return half
        raise ValueError(f'{name} is of neither the attention nor the MLP of a layer')

    def _norm(self, rest: str, fused: bool) -> str:
        if self.distributed:
            for apart, joined in NORMS:
                old, new = (apart, joined) if fused else (joined, apart)
                if rest.startswith(old):
                    return new + rest.removeprefix(old)
        return rest
