"""The memory of a model's layers: where it is attached, and how token ids get there."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc.engram.addresses import addresses
from megatron_mhc.engram.generation import LayerCache, check_inference
from megatron_mhc.engram.hashing import hash_ngrams
from megatron_mhc.engram.layer import EngramLayer
from megatron_mhc.engram.token_map import current_tokenizer, token_map
from megatron_mhc.engram.tokens import LARGEST_ID, Tokens, own_share, placed, received, sent
from megatron_mhc.residual.block import final_norm_of
from megatron_mhc.residual.post_stream import settle
from megatron_mhc.residual.single_pass import hand_on
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.model_config import ENGRAM
from megatron_mhc.settings.refused_engram import check_engram

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer


class EngramMemory(MegatronModule):
    """The memories of one pipeline stage, a child of its block; ``layer_N`` belongs to layer N.

    The model's forward leaves its tokens here (``note``) and each layer takes what it needs
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
        if model.pre_process:
            compressed = token_map(current_tokenizer(), model.vocab_size)
            self.register_buffer('token_map', compressed, persistent=False)
        own = {layer.layer_number for layer in model.decoder.layers}.intersection(engram.layers)
        self.addresses = {n: addresses(engram, n, model.vocab_size) for n in sorted(own)}
        for number in self.addresses:
            groups = model.decoder.pg_collection
            layer = EngramLayer(engram, number, num_streams, model.config, groups)
            self.add_module(f'layer_{number}', layer)
        self.tokens: Tokens | None = None
        self._noted: dict[int, tuple[Tensor, Tensor, LayerCache | None]] = {}

    @property
    def on_share(self) -> tuple[torch.distributed.ProcessGroup, bool]:
        """The tensor-parallel ranks, and whether each has its share of the sequence."""
        return self.tp_group, self.config.sequence_parallel

    def note(self, tokens: Tokens, context: Any = None) -> None:
        """Hash the n-grams of a microbatch for all layers, and keep them inside of documents.

        Args:
            tokens: of the whole sequence, or of the next step of inference.
            context: of inference.
        """
        self.tokens, self._noted = tokens, {}
        own = own_share(tokens.positions.t(), *self.on_share)
        for number, where in self.addresses.items():
            cache = None if context is None else LayerCache(context, number, tokens.ids)
            earlier = None if cache is None else cache.earlier
            found = hash_ngrams(*tokens, self.engram, where, earlier)
            self._noted[number] = found, own, cache

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
        ValueError: a setting that cannot be combined, or a layer that the model does not have.
    """
    check_engram(config, engram, main)
    # The optimizer and the pipeline read it from the config they share with the model.
    ENGRAM.attach(config, engram)


def attach(model: LanguageModule, engram: EngramConfig, num_streams: int) -> None:
    """Give the listed layers of a built model, or of one stage of it, their memory.

    Layers count as Megatron numbers them: in a hybrid model each symbol of the pattern is one.

    Hooks only: the model stays what it is, and its parameters keep their names.

    Raises:
        ValueError: token ids that would not survive the way to the next stage.
    """
    block, stages = model.decoder, model.config.pipeline_model_parallel_size
    if stages > 1 and model.vocab_size >= LARGEST_ID:
        raise ValueError(
            f'--engram-layers: {model.vocab_size} token ids, but those from {LARGEST_ID} on cannot '
            'be sent to the next pipeline stage; use --pipeline-model-parallel-size 1'
        )
    memory = block.engram = EngramMemory(engram, model, num_streams)
    note = _note if model.pre_process else _take_over
    model.register_forward_pre_hook(functools.partial(note, memory), with_kwargs=True)
    for before, layer in zip([None, *block.layers], block.layers, strict=False):
        if layer.layer_number in memory.addresses:
            layer.register_forward_pre_hook(functools.partial(_add, memory), with_kwargs=True)
            if before is not None:
                # Hyper-connections would read the streams for this layer before they are complete.
                before.following = ()
    if stages > 1 and final_norm_of(block) is None:
        block.register_forward_hook(functools.partial(_hand_over, memory))


def _take_over(
    memory: EngramMemory, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tokens of the stage before; behind the final norm, where C values arrive, there are none."""
    del args, kwargs
    message = model.decoder.input_tensor
    if message.shape[-1] != memory.config.hidden_size:
        streams, tokens = received(message, memory.engram, *memory.on_share)
        model.decoder.set_input_tensor(streams)
        memory.note(tokens)


def _hand_over(
    memory: EngramMemory, block: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    """What leaves the stage, with its tokens."""
    del block, args
    tokens, memory.tokens = memory.tokens, None
    if tokens is None:
        return output
    settle(output)
    return sent(output, tokens, *memory.on_share)


def _note(
    memory: EngramMemory, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    context = given.get('inference_context') or given.get('inference_params')
    if context is not None:
        check_inference(context, memory.config)
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
    ids = memory.token_map[given['input_ids']]
    start = 0 if context is None else context.sequence_len_offset
    memory.note(placed(ids, given.get('position_ids'), bounds, start), context)


def _add(
    memory: EngramMemory, layer: TransformerLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    if args:
        return (memory.add_to(args[0], layer.layer_number), *args[1:]), kwargs
    streams = memory.add_to(kwargs['hidden_states'], layer.layer_number)
    return args, {**kwargs, 'hidden_states': streams}
