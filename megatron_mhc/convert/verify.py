"""Run the models of two checkpoints on the same random tokens, in fp32 on the CPU.

    python -m megatron_mhc.convert.verify FIRST SECOND LAYOUT_OF_FIRST

A process of its own, because a model needs Megatron's process groups. Layers are ours; where a
checkpoint is in another layout, their maps are those of ``maps.py``, computed from its own tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mhc import ops
from megatron_mhc.convert import worker
from megatron_mhc.convert.complete import stored_name
from megatron_mhc.convert.maps import maps, merge_gates, stored_head, stored_parameters
from megatron_mhc.convert.saved_args import Described, describe
from megatron_mhc.convert.source import OPAQUE, Source, open_source
from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.settings.residual import ResidualConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

SEQUENCES, LENGTH, SEED = 2, 64, 1
# One process, plain layers, every sum in fp32.
LOCAL = {
    'tensor_model_parallel_size': 1,
    'pipeline_model_parallel_size': 1,
    'virtual_pipeline_model_parallel_size': None,
    'pipeline_model_parallel_layout': None,
    'decoder_first_pipeline_num_layers': None,
    'decoder_last_pipeline_num_layers': None,
    'context_parallel_size': 1,
    'expert_model_parallel_size': 1,
    'expert_tensor_parallel_size': 1,
    'sequence_parallel': False,
    'transformer_impl': 'local',
    'use_cpu_initialization': True,
    'bf16': False,
    'fp16': False,
    'fp8': None,
    'fp4': None,
    'params_dtype': torch.float32,
    'no_persist_layer_norm': True,
    'gradient_accumulation_fusion': False,
    'masked_softmax_fusion': False,
    'bias_swiglu_fusion': False,
    'bias_dropout_fusion': False,
    'apply_rope_fusion': False,
    'moe_grouped_gemm': False,
    'moe_permute_fusion': False,
    'moe_token_dispatcher_type': 'allgather',
    'recompute_granularity': None,
    'recompute_modules': None,
    'overlap_moe_expert_parallel_comm': False,
    'delay_wgrad_compute': False,
    'tp_comm_overlap': False,
    'mtp_num_layers': None,
    'cuda_graph_impl': 'none',
    'enable_cuda_graph': False,
    'external_cuda_graph': False,
}


def largest_difference(first: pathlib.Path, second: pathlib.Path, origin: str) -> dict[str, Any]:
    """``difference`` of the logits, the ``largest`` of them, and how many were compared.

    Args:
        origin: layout of the first, as ``--from`` has it.

    Raises:
        ValueError: a model cannot be built from its saved arguments.
    """
    try:
        return worker.answer(__spec__.name, str(first), str(second), origin)
    except worker.NoAnswer as error:
        raise ValueError(
            f'--verify: the two models could not be run ({error}); leave it out, and compare the '
            'first validation loss of a run with --finetune'
        ) from None


def main(argv: list[str]) -> None:
    from megatron_mhc.bootstrap import prepare

    prepare('cpu')
    first, second, origin = argv
    with process_group():
        a = logits(pathlib.Path(first), origin)
        b = logits(pathlib.Path(second), 'auto')
    print_difference(a, b)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Megatron's groups for a world of one."""
    from megatron.core import parallel_state, tensor_parallel

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def print_difference(a: Tensor, b: Tensor) -> None:
    """As JSON, for ``worker.answer``."""
    print(
        json.dumps(
            {
                'difference': (a - b).abs().max().item(),
                'largest': a.abs().max().item(),
                'compared': a.numel(),
            }
        )
    )


def logits(path: pathlib.Path, origin: str) -> Tensor:
    """``[2, s, vocabulary]`` of ``random_tokens``."""
    source = open_source(path)
    described = describe(source, origin)
    return run(source, described, build(source, described))


@torch.no_grad()
def run(source: Source, described: Described, model: GPTModel) -> Tensor:
    """Logits of a model that was built for ``source``, with its weights."""
    model = model.eval()
    load(model, source, described)
    tokens = random_tokens(source.args)
    length = tokens.shape[-1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    found: Tensor = model(tokens, positions, mask).float()
    return found


def random_tokens(args: argparse.Namespace) -> Tensor:
    """``[2, s]``, the same for every checkpoint of that shape."""
    length = min(LENGTH, args.max_position_embeddings or LENGTH)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(args.padded_vocab_size, (SEQUENCES, length), generator=generator)


def build(
    source: Source,
    described: Described,
    prediction: bool = False,
    residual: ResidualConfig | None = None,
) -> GPTModel:
    """A model of the saved arguments with local layers, n streams if there are any.

    Args:
        prediction: with the layers of multi-token prediction, which logits do not need.
        residual: its residual connections, where ``described`` does not tell.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_mhc.residual.block import widen_block
    from megatron_mhc.residual.spec import with_residual

    args = copy.copy(source.args)
    for name, value in LOCAL.items():
        setattr(args, name, value)
    if prediction:
        args.mtp_num_layers = getattr(source.args, 'mtp_num_layers', None)
    residual = residual or ResidualConfig('standard')
    if described.layout is not None:
        residual = ResidualConfig(
            num_residual_streams=described.num_streams,
            sinkhorn_iterations=described.iterations,
            stream_merge='learned' if described.learned else 'mean',
            norm_eps=described.norm_eps,
            kernel_backend='torch',
        )
    config = core_transformer_config_from_args(args)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization
    )
    mtp_spec = None
    if args.mtp_num_layers:
        # Prediction layers keep the stock residual.
        layers = get_gpt_decoder_layer_specs(config, False, args.normalization)
        mtp_spec = get_gpt_mtp_block_spec(config, layers[-1], False)
    model = GPTModel(
        config,
        with_residual(spec, residual),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        mtp_block_spec=mtp_spec,
    )
    if residual.enabled:
        widen_block(model.decoder, residual)
    return model


def load(model: GPTModel, source: Source, described: Described) -> None:
    """Fill ``model``, and give it the maps of the checkpoint's layout where that is not ours."""
    foreign = described.layout is not None and described.name != 'mhc'
    if foreign:
        _use_maps(model, source, described)
    own = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if OPAQUE not in name and not (foreign and _maps_streams(name))
    }
    stored = {name: stored_name(source, name) for name in own}
    if source.entries.keys() >= {*stored.values()}:
        for name, value in own.items():
            value.copy_(source.tensor(stored[name]))
    else:
        _load_sharded(model, source, foreign)


def _maps_streams(name: str) -> bool:
    return '_hyper_connection.' in name or 'stream_merge.' in name


def _load_sharded(model: GPTModel, source: Source, foreign: bool) -> None:
    """By the names of a distributed checkpoint, where equal layers are one tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = model.sharded_state_dict(metadata=dict(source.common.get('content_metadata') or {}))
    apply_factories(sharded)
    for part in nested_values(sharded):
        if isinstance(part, ShardedTensor) and not (foreign and _maps_streams(part.key)):
            sizes = [1] * part.prepend_axis_num + list(part.local_shape)
            where = zip(part.global_offset, sizes, strict=True)
            value = source.tensor(stored_name(source, part.key))
            value = value[tuple(slice(o, o + size) for o, size in where)]
            part.data.copy_(value.reshape(part.data.shape))


def _use_maps(model: GPTModel, source: Source, described: Described) -> None:
    """Replace what our modules compute by ``maps.py``, from the tensors in the file."""
    layout, n = described.layout, described.num_streams
    assert layout is not None

    def get(layer: int) -> Callable[[str], Tensor]:
        return lambda name: (
            source.tensor(name)[layer] if described.stacked else source.tensor(name)
        ).float()

    def use(connection: HyperConnection, layer: int, sublayer: int) -> None:
        index = None if described.stacked else layer
        stored = stored_parameters(get(layer), layout, index, sublayer)
        # On this instance alone.
        connection.all_maps = (  # type: ignore[method-assign]
            lambda x: maps(layout, x, stored, n, described.iterations)
        )
        connection.read = lambda x: HyperConnection.read(connection, x)  # type: ignore[method-assign]

    for layer, module in enumerate(model.decoder.layers):
        use(module.self_attention_hyper_connection, layer, 0)
        use(module.mlp_hyper_connection, layer, 1)
    head, eps = stored_head(source.tensor, layout, source.entries), model.config.layernorm_epsilon
    model.decoder.stream_merge.forward = lambda x: ops.pre(
        x, merge_gates(layout, x, head, n, eps), backend='torch'
    )


if __name__ == '__main__':
    main(sys.argv[1:])
