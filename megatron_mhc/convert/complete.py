"""Compare a checkpoint with the model that its arguments describe, before anything is written.

The model is Megatron's own, built on the meta device, so without memory, and in a process of its
own, since it needs process groups:

    python -m megatron_mhc.convert.complete SRC LAYOUT

LAYOUT is also ``own``, whatever the saved arguments tell of our connections, and ``hybrid`` or
``gpt``, the same model as one of the other class.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Container

import torch

from megatron_mhc.convert import worker
from megatron_mhc.convert.choices import MODEL_CLASSES, OWN
from megatron_mhc.convert.source import OPAQUE, Chunk, Entry, Source, open_source

# Parameters of streams are checked against n and C as they are read.
STREAMS = ('_hyper_connection.', 'stream_merge.', 'hc_head')
# Transformer Engine keeps a norm with the linear layer behind it, and so do names that local layers
# save, whether or not one is behind it: there is none behind the norm before experts.
FUSED = (
    ('.input_layernorm.', '.self_attention.linear_qkv.layer_norm_'),
    ('.pre_mlp_layernorm.', '.mlp.linear_fc1.layer_norm_'),
    ('.self_attention.q_layernorm.', '.self_attention.linear_q_up_proj.layer_norm_'),
    ('.self_attention.kv_layernorm.', '.self_attention.linear_kv_up_proj.layer_norm_'),
)
# An expert of the local layers, of which grouped ones number the weights.
EXPERT = re.compile(r'\.local_experts\.(\d+)\.(linear_fc\d\.(?:weight|bias))$')
Expected = dict[str, tuple[list[int], str]]


def check_parts(source: Source) -> None:
    """Raise ValueError unless the parts of each tensor cover it, all of it and none of it twice."""
    for name, entry in source.entries.items():
        if entry.shape is None:
            continue
        where = f'{source.folder}: {name} {list(entry.shape)}'
        for chunk in entry.chunks:
            ends = (start + size for start, size in zip(*chunk, strict=True))
            bounds = zip(chunk.offsets, ends, entry.shape, strict=True)
            if any(start < 0 or end > size for start, end, size in bounds):
                raise ValueError(f'{where} has a part outside of it; take another copy')
        sizes = [torch.Size(chunk.sizes).numel() for chunk in entry.chunks]
        if sum(sizes) != torch.Size(entry.shape).numel():
            raise ValueError(f'{where}: parts of it are missing; take another copy')
        if _overlap(entry):
            raise ValueError(f'{where} has parts that overlap, so others are missing; take another')


def _overlap(entry: Entry) -> bool:
    def meet(a: Chunk, b: Chunk) -> bool:
        return all(
            x < y + m and y < x + n
            for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
        )

    return any(meet(a, b) for a, b in itertools.combinations(entry.chunks, 2))


def check_model(source: Source, origin: str) -> None:
    """Raise ValueError unless the checkpoint holds every weight of its model, as it has to be.

    Args:
        origin: layout of the source, as ``--from`` has it.
    """
    if not hasattr(source.args, 'padded_vocab_size'):
        # Of another library, whose model is none of Megatron's; its arguments are those of mHC.
        return
    named, sharded = expected(source, origin)
    missing, strange = min(
        (_compare(source, weights) for weights in (named, sharded)),
        key=lambda found: len(found[0]),
    )
    if missing:
        raise ValueError(
            f'{source.folder}: {missing[0]} is missing, a weight of the model that the saved '
            'arguments describe; take another copy or another iteration, or add --unchecked where '
            'the model is not the one that pretrain_gpt.py builds'
        )
    if strange:
        raise ValueError(
            f'{source.folder}: {strange[0]}: the checkpoint and its saved arguments do not belong '
            'together; take another copy or another iteration'
        )


def expected(source: Source, origin: str) -> tuple[Expected, Expected]:
    """Weights of the model: as modules name them, and as distributed checkpoints do.

    Args:
        origin: layout, ``own``, ``hybrid`` or ``gpt``, as the head of this file has it.

    Raises:
        ValueError: the model cannot be built.
    """
    return _expected(str(source.folder), origin, _key(source))


def _compare(source: Source, weights: Expected) -> tuple[list[str], list[str]]:
    missing, strange = [], []
    dtypes = (torch.float32, getattr(source.args, 'params_dtype', torch.float32))
    for name, (shape, dtype) in weights.items():
        entry = source.entries.get(stored_name(source.entries, name))
        if entry is None or entry.shape is None:
            missing.append(name)
        elif list(entry.shape) != shape:
            strange.append(f'{name} has shape {list(entry.shape)} where its model has {shape}')
        elif entry.dtype not in dtypes and str(entry.dtype) != dtype:
            strange.append(f'{name} is recorded as {entry.dtype} where its model has {dtypes[-1]}')
    return missing, strange


def stored_name(entries: Container[str], name: str) -> str:
    """What ``entries`` call a weight of local layers; ``name`` where it has no other either."""
    others = [EXPERT.sub(r'.\2\1', name)]
    for apart, joined in FUSED:
        others += [name.replace(apart, joined), name.replace(joined, apart)]
    return next((one for one in (name, *others) if one in entries), name)


def _key(source: Source) -> str:
    """What decides the model: the same arguments and layer names give the same answer."""
    return f'{sorted(map(str, vars(source.args).items()))} {source.common.get("content_metadata")}'


@functools.lru_cache(maxsize=8)
def _expected(folder: str, origin: str, key: str) -> tuple[Expected, Expected]:
    try:
        return tuple(worker.answer(__spec__.name, folder, origin))
    except worker.NoAnswer as error:
        raise ValueError(
            f'{folder}: the model that its saved arguments describe cannot be built here '
            f'({error}), so nothing tells whether the checkpoint is whole; add --unchecked to '
            'convert what it holds'
        ) from None


def main(argv: list[str]) -> None:
    """Print names, shapes and dtypes: of the ``torch`` format, and of ``torch_dist``."""
    from megatron_mhc.bootstrap import prepare

    prepare('cpu')
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_mhc.convert.build import build, residual_of
    from megatron_mhc.convert.class_args import moved_args
    from megatron_mhc.convert.saved_args import describe, own_residual

    folder, origin = argv
    with tempfile.TemporaryDirectory() as store:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{store}/store', rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        source = open_source(pathlib.Path(folder))
        args, of_layout = source.args, origin not in (OWN, *MODEL_CLASSES)
        residual = residual_of(describe(source, origin)) if of_layout else own_residual(args)
        if origin in MODEL_CLASSES:
            args = moved_args(args, origin)
        with torch.device('meta'):
            model = build(args, residual, prediction=True)
        parts = model.sharded_state_dict(metadata=dict(source.common.get('content_metadata') or {}))
        apply_factories(parts)
        found = [part for part in nested_values(parts) if isinstance(part, ShardedTensor)]
        tables = (
            {name: (value.shape, value.dtype) for name, value in _tensors(model).items()},
            {part.key: (part.global_shape, part.dtype) for part in found},
        )
        torch.distributed.destroy_process_group()
    print(
        json.dumps(
            [
                {
                    name: (list(shape), str(dtype))
                    for name, (shape, dtype) in table.items()
                    if OPAQUE not in name
                    and not (of_layout and any(part in name for part in STREAMS))
                }
                for table in tables
            ]
        )
    )


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


if __name__ == '__main__':
    main(sys.argv[1:])
