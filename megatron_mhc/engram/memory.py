"""The memory of a model's layers: where it is attached, and how token ids get there."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc.engram.addresses import addresses
from megatron_mhc.engram.hashing import hash_ngrams
from megatron_mhc.engram.layer import EngramLayer
from megatron_mhc.engram.token_map import current_tokenizer, token_map
from megatron_mhc.residual.single_pass import hand_on
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.hybrid_stages import first_stage_layers
from megatron_mhc.settings.model_config import ENGRAM
from megatron_mhc.settings.refused_engram import check_engram, check_stage

ENDS = ('first', 'last')

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer


class EngramMemory(MegatronModule):
    """The memories of one pipeline stage, a child of its block; ``layer_N`` belongs to layer N.

    The model's forward leaves the token ids here (``note``) and each layer takes what it needs
    (``add_to``), once: a layer that ran twice, or for other tokens, would find nothing.

    Args:
        engram: the settings.
        model: holds the layers.
        num_streams: n of its residual stream.
    """

    def __init__(self, engram: EngramConfig, model: LanguageModule, num_streams: int) -> None:
        super().__init__(model.config)
        self.engram = engram
        self.tp_group = model.decoder.pg_collection.tp
        compressed = token_map(current_tokenizer(), model.vocab_size)
        self.register_buffer('token_map', compressed, persistent=False)
        self.addresses = {n: addresses(engram, n, model.vocab_size) for n in engram.layers}
        for number in engram.layers:
            layer = EngramLayer(engram, number, num_streams, model.config, self.tp_group)
            self.add_module(f'layer_{number}', layer)
        self._noted: dict[int, tuple[Tensor, Tensor]] = {}

    def note(
        self, input_ids: Tensor, position_ids: Tensor | None, bounds: Tensor | None = None
    ) -> None:
        """Hash the n-grams of a microbatch for all layers, and keep them inside of documents.

        Args:
            input_ids: ``[b, s]``.
            position_ids: ``[b, s]``; they may begin again with every document.
            bounds: of packed documents, ``[documents + 1]``: where each begins and the last ends.
        """
        ids = self.token_map[input_ids]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if bounds is not None:
            # What follows the last document is padding, and one more of them.
            bounds = bounds.to(positions.dtype)
            document = torch.searchsorted(bounds, positions.contiguous(), right=True) - 1
            positions = positions - bounds[document]
        elif position_ids is not None:
            positions = position_ids.minimum(positions)
        own = positions.t()
        if self.config.sequence_parallel:
            own = own.chunk(self.tp_group.size())[self.tp_group.rank()]
        self._noted = {
            number: (hash_ngrams(ids, positions, self.engram, where), own)
            for number, where in self.addresses.items()
        }

    def add_to(self, x: Tensor, number: int) -> Tensor:
        """The streams before layer ``number``, with what its memory adds."""
        if number not in self._noted:
            raise RuntimeError(
                f'--engram-layers: layer {number} ran without the ids of its tokens, or a second '
                'time; call the model itself, not its decoder'
            )
        added = getattr(self, f'layer_{number}')(x, *self._noted.pop(number))
        hand_on(x, added)
        return added


def prepare_engram(
    config: TransformerConfig, engram: EngramConfig, main: str | None = None
) -> None:
    """Check a model's config before it is built; all its stages come to the same result.

    Args:
        config: the model's.
        engram: the settings.
        main: the main layers of a hybrid model's pattern.

    Raises:
        ValueError: a setting that cannot be combined, or a layer behind the first pipeline stage.
    """
    check_engram(config, engram)
    layout = config.pipeline_model_parallel_layout
    if main is not None:
        first, last = (getattr(config, f'num_layers_in_{end}_pipeline_stage') for end in ENDS)
        layers = first_stage_layers(main, config.pipeline_model_parallel_size, first, last)
    elif layout is None:
        layers = get_num_layers_to_build(config, vp_stage=0, pp_rank=0)
    else:
        layers = layout.layout[0][0].count(LayerType.decoder)
    check_stage(engram, layers)
    # The optimizer reads it from the config it shares with the model.
    ENGRAM.attach(config, engram)


def attach(model: LanguageModule, engram: EngramConfig, num_streams: int) -> None:
    """Give the listed layers of a built model their memory. Other stages than the first have none.

    Layers count as Megatron numbers them: in a hybrid model each symbol of the pattern is one.

    Hooks only: the model stays what it is, and its parameters keep their names.
    """
    if not model.pre_process:
        return
    memory = model.decoder.engram = EngramMemory(engram, model, num_streams)
    model.register_forward_pre_hook(functools.partial(_note, memory), with_kwargs=True)
    for before, layer in zip([None, *model.decoder.layers], model.decoder.layers, strict=False):
        if layer.layer_number in engram.layers:
            layer.register_forward_pre_hook(functools.partial(_add, memory), with_kwargs=True)
            if before is not None:
                # Hyper-connections would read the streams for this layer before they are complete.
                before.following = ()


def _note(
    memory: EngramMemory, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    if given.get('inference_context') or given.get('inference_params'):
        raise NotImplementedError(
            '--engram-layers: inference with a KV cache passes on the newest tokens only, and the '
            'n-grams need those before; call the model on whole sequences, without a context'
        )
    if given.get('input_ids') is None:
        raise ValueError(
            '--engram-layers: the model was called without input_ids, whose n-grams it looks up; '
            'pass them beside decoder_input'
        )
    packed = given.get('packed_seq_params')
    bounds = None
    if packed is not None:
        padded = packed.cu_seqlens_q_padded
        bounds = packed.cu_seqlens_q if padded is None else padded
    memory.note(given['input_ids'], given.get('position_ids'), bounds)


def _add(
    memory: EngramMemory, layer: TransformerLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    if args:
        return (memory.add_to(args[0], layer.layer_number), *args[1:]), kwargs
    streams = memory.add_to(kwargs['hidden_states'], layer.layer_number)
    return args, {**kwargs, 'hidden_states': streams}
