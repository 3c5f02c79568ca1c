"""A GPT model as a hybrid layer pattern, and back: a GPT layer is two layers of a pattern.

``*`` attention or ``+`` latent attention, then ``-`` an MLP or ``E`` experts; ``|`` ends a pipeline
stage, and ``/`` begins a depth of multi-token prediction.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from megatron_mhc.schedules.pattern_stages import in_stages
from megatron_mhc.settings.constraint import layer_pattern
from megatron_mhc.settings.hybrid_stages import LAYERS

STAGE, DEPTH = '|', '/'
ATTENTION, MLP = '*+', '-E'
FLAG = '--hybrid-layer-pattern'


class Pattern(NamedTuple):
    """A pattern in its parts.

    Attributes:
        layers: one symbol for each layer of the decoder.
        stages: number of layers of each pipeline stage; one number where no stage ends.
        depths: of multi-token prediction, the symbols of each.
    """

    layers: str
    stages: tuple[int, ...]
    depths: tuple[str, ...]

    def __str__(self) -> str:
        return DEPTH.join([in_stages(self.layers, self.stages), *self.depths])


def parsed(pattern: str) -> Pattern:
    """``pattern`` in its parts."""
    main, *depths = pattern.split(DEPTH)
    stages = main.split(STAGE)
    return Pattern(''.join(stages), tuple(map(len, stages)), tuple(filter(None, depths)))


def pattern_of(args: argparse.Namespace) -> str | None:
    """The layer pattern that a run was saved with, by either name of its flag; None of a GPT."""
    return layer_pattern(vars(args).get)


def symbols_of_gpt(args: argparse.Namespace) -> str:
    """The layers of a GPT model as symbols, two for each of its own."""
    attention = '+' if getattr(args, 'multi_latent_attention', False) else '*'
    return ''.join(attention + ('E' if experts else '-') for experts in _has_experts(args))


def _has_experts(args: argparse.Namespace) -> list[bool]:
    layers: int = args.num_layers
    if not getattr(args, 'num_experts', None):
        return [False] * layers
    every = getattr(args, 'moe_layer_freq', 1)
    if isinstance(every, int):
        return [layer % every == 0 for layer in range(layers)]
    if len(every) != layers:
        raise ValueError(
            f'--moe-layer-freq {every}: it names {len(every)} layers where the model has {layers}: '
            'the saved arguments do not belong together'
        )
    return [bool(one) for one in every]


def require_gpt_layers(pattern: str) -> None:
    """Raise ValueError unless every two layers of ``pattern`` are one of a GPT model.

    The message names the first that is not, with its number as names of parameters have it.
    """
    layers, _, depths = parsed(pattern)
    for number, symbol in enumerate(layers):
        where = f'{FLAG} {pattern}: layer {number} is {LAYERS.get(symbol, symbol)} ({symbol})'
        if symbol not in ATTENTION + MLP:
            raise ValueError(f'{where}, which no GPT model has: it stays hybrid')
        if symbol not in (MLP if number % 2 else ATTENTION):
            wanted = 'an MLP or experts' if number % 2 else 'attention'
            raise ValueError(
                f'{where} where a GPT model has {wanted}, for its layers are attention and then '
                'an MLP or experts: it stays hybrid'
            )
    if len(layers) % 2 or not layers:
        raise ValueError(
            f'{FLAG} {pattern}: its last layer, {len(layers) - 1}, is attention with no MLP behind '
            'it, which every layer of a GPT model has: it stays hybrid'
        )
    for depth in depths:
        if depth != layers[-2:]:
            raise ValueError(
                f'{FLAG} {pattern}: a depth of prediction is {depth} where a GPT model has its '
                f'last layer, {layers[-2:]}: it stays hybrid'
            )
