"""Pipeline stages in saved arguments: flags of a GPT model, pipes in a hybrid layer pattern.

Checkpoints do not depend on them; a run that goes on under the same layout does.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_mhc.schedules.inverted_v import written

# Layers of the first and the last stage, which both kinds of models can be told.
ENDS = ('decoder_first_pipeline_num_layers', 'decoder_last_pipeline_num_layers')
EACH, CHUNKS, LAYOUT = (
    'num_layers_per_virtual_pipeline_stage',
    'virtual_pipeline_model_parallel_size',
    'pipeline_model_parallel_layout',
)
# What a hybrid model is refused with.
GPT_ALONE = {
    EACH: None,
    'num_virtual_stages_per_pipeline_rank': None,
    LAYOUT: None,
    'account_for_embedding_in_pipeline_split': False,
    'account_for_loss_in_pipeline_split': False,
}


def stages_of_gpt(args: argparse.Namespace) -> list[int] | None:
    """Number of GPT layers of each stage, in the order of the model.

    None where a pattern without pipes says the same: one stage a rank, equal but for ``ENDS``.
    """
    get = vars(args).get
    ranks, chunks = get('pipeline_model_parallel_size') or 1, get(CHUNKS) or 1
    if get(LAYOUT):
        return _of_layout(str(get(LAYOUT)))
    counted = (
        get('account_for_embedding_in_pipeline_split'),
        get('account_for_loss_in_pipeline_split'),
    )
    if ranks == 1 or (chunks == 1 and not any(counted)):
        return None
    first, last = (get(name) for name in ENDS)
    given = [count for count in (first, last) if count is not None]
    others = ranks - len(given)
    even = (args.num_layers + sum(map(bool, counted)) - sum(given)) // others if others else 0
    by_rank = [even] * ranks
    if first is not None:
        by_rank[0] = first
    if last is not None:
        by_rank[-1] = last
    stages = [count // chunks for count in by_rank] * chunks
    stages[0] -= bool(counted[0])
    stages[-1] -= bool(counted[1])
    return stages


def _of_layout(layout: str) -> list[int]:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    return [stage.count(LayerType.decoder) for stage in stages]


def gpt_flags(args: argparse.Namespace, stages: tuple[int, ...], depths: int) -> dict[str, Any]:
    """Arguments under which a GPT model has the stages of a pattern.

    Args:
        stages: number of hybrid layers of each; depths: of multi-token prediction.
    """
    get = vars(args).get
    whole = not any(count % 2 for count in stages)
    values: dict[str, Any] = {CHUNKS: None}
    if len(stages) == 1:
        ends = {name: count for name in ENDS if (count := get(name)) is not None}
        even = not any(count % 2 for count in ends.values())
        return values | {name: count // 2 if even else None for name, count in ends.items()}
    ranks = get('pipeline_model_parallel_size') or 1
    if not whole or len(stages) % ranks:
        return values
    layers, chunks = [count // 2 for count in stages], len(stages) // ranks
    values[CHUNKS] = chunks if chunks > 1 else None
    if len(set(layers)) > 1:
        values[LAYOUT] = written(layers, last='m' * depths + 'L')
    elif chunks > 1:
        values[EACH] = layers[0]
    return values
