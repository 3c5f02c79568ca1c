"""Refuse a ``torch`` checkpoint that would leave a part of the model as it was initialised.

That format has a file for each rank and, in it, layers numbered within each chunk of the pipeline.
Megatron skips a chunk that the file has not, and loads what is left of one whose names differ, with
a message but without an error; so all that decides names and places must be as it was saved. The
other formats name every weight of the whole model, and a missing one ends the run.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

from megatron_mhc.inputs.values import flag_of
from megatron_mhc.settings.names import TWO_CHUNK_SCHEDULES

# Arguments that say which layers a rank has.
PLACES = (
    'tensor_model_parallel_size',
    'pipeline_model_parallel_size',
    'expert_model_parallel_size',
    'pipeline_model_parallel_layout',
    'decoder_first_pipeline_num_layers',
    'decoder_last_pipeline_num_layers',
    'account_for_embedding_in_pipeline_split',
    'account_for_loss_in_pipeline_split',
)
# Arguments that say what the weights of a layer are called.
NAMES = (
    'transformer_impl',
    'num_layers',
    'num_experts',
    'multi_latent_attention',
    'hybrid_layer_pattern',
)
# Arguments that add weights, which a checkpoint without them would leave as they are.
ADDED = (
    'add_bias_linear',
    'add_qkv_bias',
    'qk_layernorm',
    'mtp_num_layers',
    'untie_embeddings_and_output_weights',
    'moe_shared_expert_intermediate_size',
)
RESHARD = (
    'save it once in the distributed format, under the layout that it has, with '
    '--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER'
)


def check_chunks(args: argparse.Namespace, found: Any) -> None:
    """Raise ValueError unless every weight of the run's model will come from a checkpoint.

    Args:
        args: of the run, parsed but not validated.
        found: the checkpoint, ``megatron_mhc.checkpoints.check.Found``.
    """
    where = f'{found.flag} {found.source}'
    if found.format == 'torch_dist':
        asked = getattr(args, 'ckpt_format', 'torch_dist')
        if asked == 'torch' and not getattr(args, 'auto_detect_ckpt_format', False):
            raise ValueError(
                f'--ckpt-format torch: {where} is of the format torch_dist on disk; add '
                '--auto-detect-ckpt-format, or use --ckpt-format torch_dist'
            )
    if found.format != 'torch':
        return
    if not found.chunks:
        raise ValueError(
            f'{where}: {found.folder.name} has no weights: its file has no "model"; choose another '
            'iteration with --ckpt-step'
        )
    schedule = getattr(args, 'pipeline_schedule', None)
    if schedule in TWO_CHUNK_SCHEDULES:
        raise ValueError(
            f'--pipeline-schedule {schedule}: {where} is of the format torch on disk, which '
            'numbers the chunks of its own pipeline, so that a V would start with fresh or '
            f'misplaced weights; {RESHARD}'
        )
    for name, was, wanted in _differences(args, found):
        raise ValueError(
            f'{where} is of the format torch on disk and was saved with {name} {was}, but this run '
            f'has {wanted}: a part of its model would stay as it was initialised; repeat {was}, or '
            f'{RESHARD}'
        )
    _check_files(args, found, where)


def _differences(args: argparse.Namespace, found: Any) -> Iterator[tuple[str, Any, Any]]:
    """``(what, saved, asked)`` of each argument under which names or places differ."""
    restored = getattr(args, 'use_checkpoint_args', False)
    same_places = restored and getattr(args, 'use_mp_args_from_checkpoint_args', False)
    if found.args is not None and not same_places:
        for name in PLACES:
            if hasattr(args, name) and hasattr(found.args, name):
                was, wanted = getattr(found.args, name), getattr(args, name)
                if (was or None) != (wanted or None):
                    yield flag_of(name), was, wanted
    wanted = None if same_places else chunks_of(args, found.args)
    if wanted is not None and wanted != len(found.chunks):
        yield 'virtual pipeline stages', len(found.chunks), wanted
    if found.args is None:
        return
    # --use-checkpoint-args takes the model's shape from the checkpoint, not who implements it.
    for name in NAMES[:1] if restored else NAMES:
        was, wanted = getattr(found.args, name, None), getattr(args, name, None)
        if hasattr(found.args, name) and wanted is not None and (was or None) != (wanted or None):
            yield flag_of(name), was, wanted
    if restored:
        return
    for name in ADDED:
        was, wanted = getattr(found.args, name, None), getattr(args, name, None)
        if hasattr(found.args, name) and wanted and not was:
            yield flag_of(name), was, wanted
    learned = 'learned_absolute'
    was = getattr(found.args, 'position_embedding_type', learned)
    other = getattr(args, 'use_rotary_position_embeddings', False)
    if learned == getattr(args, 'position_embedding_type', None) != was and not other:
        yield '--position-embedding-type', was, learned


def chunks_of(args: argparse.Namespace, saved: argparse.Namespace | None) -> int | None:
    """Parts of the model on each rank, as Megatron derives it; None where it will refuse."""
    if getattr(args, 'hybrid_layer_pattern', None):
        return None
    stages = getattr(args, 'pipeline_model_parallel_size', 1)
    try:
        if layout := getattr(args, 'pipeline_model_parallel_layout', None):
            from megatron.core.transformer.pipeline_parallel_layer_layout import (
                PipelineParallelLayerLayout,
            )

            return int(PipelineParallelLayerLayout.get_num_stages_from_str(layout) // stages)
        if given := getattr(args, 'num_virtual_stages_per_pipeline_rank', None):
            return int(given)
        if each := getattr(args, 'num_layers_per_virtual_pipeline_stage', None):
            layers: int = args.num_layers or vars(saved)['num_layers']
            layers += bool(getattr(args, 'account_for_embedding_in_pipeline_split', False))
            layers += bool(getattr(args, 'account_for_loss_in_pipeline_split', False))
            return int(layers // stages // each)
    # What cannot be divided, parsed or found is for Megatron to refuse.
    except Exception:
        return None
    return 1


def _check_files(args: argparse.Namespace, found: Any, where: str) -> None:
    """Megatron ends with status 0 where the file of a rank is not there."""
    sizes = [
        max(1, getattr(args, f'{kind}_model_parallel_size', 1) or 1)
        for kind in ('tensor', 'pipeline', 'expert')
    ]
    if getattr(args, 'use_mp_args_from_checkpoint_args', False):
        return
    wanted = [
        f'mp_rank_{t:02d}'
        + (f'_{p:03d}' if sizes[1] > 1 else '')
        + (f'_{e:03d}' if sizes[2] > 1 else '')
        for t in range(sizes[0])
        for p in range(sizes[1])
        for e in range(sizes[2])
    ]
    there = {file.parent.name for file in pathlib.Path(found.folder).glob('*/model_optim_rng.pt')}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(
            f'{where}: {found.folder.name} has no {missing[0]}/model_optim_rng.pt, which a run of '
            f'{sizes[0]} tensor, {sizes[1]} pipeline and {sizes[2]} expert ranks reads; load it '
            f'under the layout that saved it, or {RESHARD}'
        )
