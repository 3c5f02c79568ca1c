"""Run the models of two checkpoints on the same random tokens, in fp32 on the CPU.

    python -m megatron_mhc.convert.verify FIRST SECOND LAYOUT_OF_FIRST

A process of its own, because a model needs Megatron's process groups. Layers are ours; where a
checkpoint is in another layout, their maps are those of ``maps.py``, computed from its own tensors.
"""

from __future__ import annotations

import argparse
import contextlib
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
from megatron_mhc.convert.build import build, residual_of
from megatron_mhc.convert.choices import OWN
from megatron_mhc.convert.complete import stored_name
from megatron_mhc.convert.maps import maps, merge_gates, stored_head, stored_parameters
from megatron_mhc.convert.saved_args import Described, describe, own_residual
from megatron_mhc.convert.source import OPAQUE, Source, open_source
from megatron_mhc.residual.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from megatron.core.models.common.language_module.language_module import LanguageModule

SEQUENCES, LENGTH, SEED = 2, 64, 1


def largest_difference(first: pathlib.Path, second: pathlib.Path, origin: str) -> dict[str, Any]:
    """``difference`` of the logits, the ``largest`` of them, and how many were compared.

    Args:
        origin: layout of the first, as ``--from`` has it; or ``own``, of both whatever they are.

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
        b = logits(pathlib.Path(second), OWN if origin == OWN else 'auto')
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
    """``[2, s, vocabulary]`` of ``random_tokens``.

    With predictions beyond the next token, whose layers no other layout has, of depth d in
    ``[2d : 2d + 2]``.
    """
    source = open_source(path)
    if origin == OWN:
        return run(source, build(source.args, own_residual(source.args), prediction=True))
    described = describe(source, origin)
    return run(source, build(source.args, residual_of(described)), described)


@torch.no_grad()
def run(source: Source, model: LanguageModule, described: Described | None = None) -> Tensor:
    """Logits of a model that was built for ``source``, with its weights."""
    model = model.eval()
    load(model, source, described)
    tokens = random_tokens(source.args)
    length = tokens.shape[-1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    if model.config.mtp_num_layers:
        return _of_all_depths(model, tokens, positions, mask)
    found: Tensor = model(tokens, positions, mask).float()
    return found


def _of_all_depths(model: LanguageModule, tokens: Tensor, *inputs: Tensor) -> Tensor:
    """The model itself makes losses of all but the next token, and only with labels."""
    hidden: list[Tensor] = []
    model.mtp.register_forward_hook(lambda module, args, output: hidden.append(output))
    model(tokens, *inputs, labels=tokens)
    weight = None
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    found, _ = model.output_layer(hidden[0], weight=weight)
    # [(1 + depths) s, 2, vocabulary]
    depths = found.unflatten(0, (-1, tokens.shape[1]))
    return depths.transpose(1, 2).flatten(0, 1).float()


def random_tokens(args: argparse.Namespace) -> Tensor:
    """``[2, s]``, the same for every checkpoint of that shape."""
    length = min(LENGTH, args.max_position_embeddings or LENGTH)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(args.padded_vocab_size, (SEQUENCES, length), generator=generator)


def load(model: LanguageModule, source: Source, described: Described | None = None) -> None:
    """Fill ``model``, and give it the maps of the checkpoint's layout where that is not ours."""
    foreign = False
    if described is not None and described.layout is not None and described.name != 'mhc':
        foreign = True
        _use_maps(model, source, described)
    own = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if OPAQUE not in name and not (foreign and _maps_streams(name))
    }
    stored = {name: stored_name(source.entries, name) for name in own}
    if source.entries.keys() >= {*stored.values()}:
        for name, value in own.items():
            value.copy_(source.tensor(stored[name]))
    else:
        _load_sharded(model, source, foreign)


def _maps_streams(name: str) -> bool:
    return '_hyper_connection.' in name or 'stream_merge.' in name


def _load_sharded(model: LanguageModule, source: Source, foreign: bool) -> None:
    """By the names of a distributed checkpoint, where equal layers are one tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = model.sharded_state_dict(metadata=dict(source.common.get('content_metadata') or {}))
    apply_factories(sharded)
    for part in nested_values(sharded):
        if isinstance(part, ShardedTensor) and not (foreign and _maps_streams(part.key)):
            sizes = [1] * part.prepend_axis_num + list(part.local_shape)
            where = zip(part.global_offset, sizes, strict=True)
            value = source.tensor(stored_name(source.entries, part.key))
            value = value[tuple(slice(o, o + size) for o, size in where)]
            part.data.copy_(value.reshape(part.data.shape))


def _use_maps(model: LanguageModule, source: Source, described: Described) -> None:
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
            lambda x: maps(layout, x, stored, n, described.iterations, described.norm_eps)
        )
        if described.single_pass:
            # Reads with the map of the sublayer before already.
            return
        connection.read = lambda x: HyperConnection.read(connection, x)  # type: ignore[method-assign]

    for layer, module in enumerate(model.decoder.layers):
        use(module.self_attention_hyper_connection, layer, 0)
        use(module.mlp_hyper_connection, layer, 1)
    if described.single_pass:
        return
    head, eps = stored_head(source.tensor, layout, source.entries), model.config.layernorm_epsilon
    model.decoder.stream_merge.forward = lambda x: ops.pre(
        x, merge_gates(layout, x, head, n, eps, described.norm_eps), backend='torch'
    )


if __name__ == '__main__':
    main(sys.argv[1:])
