"""What the conditional memory cannot be combined with, or has not been tested with."""

from __future__ import annotations

from typing import Any

from megatron_mhc.settings.constraint import (
    Constraint,
    Refusals,
    Setting,
    cuda_graphs,
    full_recompute,
    offloads,
    shards_parameters,
)
from megatron_mhc.settings.engram import ROW_BLOCKS, EngramConfig
from megatron_mhc.settings.hybrid_stages import main_pattern


def _sharing_experts(get: Setting) -> int:
    """Ranks that share the experts of a layer; 1 where each has them all."""
    ranks: int = get('expert_model_parallel_size') or 1
    of_one = get('expert_tensor_parallel_size') or get('tensor_model_parallel_size') or 1
    return 1 if ranks == 1 else ranks * of_one


_ROWS = (
    Constraint(
        '--context-parallel-size',
        lambda get: (get('context_parallel_size') or 1) > 1,
        'an n-gram would end where the next rank has the tokens before it',
        'use --tensor-model-parallel-size with --sequence-parallel',
    ),
    Constraint(
        '--recompute-granularity full',
        full_recompute,
        'its backward reruns a layer when the token ids are already those of another microbatch',
        'use --recompute-granularity selective',
    ),
    Constraint(
        '--residual-type mudd',
        # The parsed arguments have the flag, the model's config the settings.
        lambda get: (
            'mudd' in (get('residual_type'), getattr(get('residual_config'), 'residual_type', ''))
        ),
        'query, key and value of a layer have separate inputs, for which no memory is defined',
        'use --residual-type mhc, hc or standard',
    ),
    Constraint(
        '--residual-type attention',
        lambda get: (
            'attention'
            in (get('residual_type'), getattr(get('residual_config'), 'residual_type', ''))
        ),
        'layers read sums of earlier outputs, to which nothing is added from beside them',
        'use --residual-type mhc, hc or standard',
    ),
    Constraint(
        '--tensor-model-parallel-size',
        lambda get: ROW_BLOCKS % (get('tensor_model_parallel_size') or 1) != 0,
        f'the rows of the tables, a multiple of {ROW_BLOCKS}, are shared evenly',
        f'use a divisor of {ROW_BLOCKS}',
    ),
    Constraint(
        '--expert-model-parallel-size x --expert-tensor-parallel-size',
        lambda get: ROW_BLOCKS % _sharing_experts(get) != 0,
        f'the rows of the tables, a multiple of {ROW_BLOCKS}, are shared evenly',
        f'let their product be a divisor of {ROW_BLOCKS}',
    ),
    Constraint(
        '--cuda-graph-impl / --enable-cuda-graph',
        cuda_graphs,
        'a replayed layer would add what the captured tokens retrieved',
        'use --cuda-graph-impl none',
    ),
    Constraint(
        '--transformer-impl inference_optimized',
        lambda get: get('transformer_impl') == 'inference_optimized',
        'its dynamic batches do not keep the tokens before the newest ones, which n-grams need',
        'use --transformer-impl transformer_engine or local',
    ),
    Constraint(
        '--cpu-offloading-num-layers / --fine-grained-activation-offloading',
        offloads,
        'offloaded activations are not tested with what the memory adds',
        'use selective recomputation',
    ),
    Constraint(
        '--use-megatron-fsdp / --use-torch-fsdp2',
        shards_parameters,
        'the tables are shared over tensor-parallel ranks only',
        'use --use-distributed-optimizer',
    ),
    Constraint(
        '--decoupled-lr',
        lambda get: get('decoupled_lr') is not None,
        "the only mark by which Megatron keeps the tables from Muon is the embedding's, and with "
        'it goes the decoupled rate',
        'drop it; --engram-lr-mult sets the rate of the tables',
    ),
    Constraint(
        '--export-kd-teacher-load',
        lambda get: bool(get('export_kd_teacher_load')),
        'the teacher would be built with a memory too',
        'drop the flag',
    ),
    Constraint(
        '--yaml-cfg',
        lambda get: get('yaml_cfg') is not None,
        'a YAML configuration discards every command-line value, the layers among them',
        'pass the settings as flags',
    ),
)
ENGRAM = Refusals('--engram-layers', 'leave out --engram-layers', _ROWS)


def check_engram(settings: object, engram: EngramConfig, main: str | None = None) -> None:
    """Raise ValueError for the first refused pair found in ``settings``.

    Args:
        settings: parsed arguments or a ``TransformerConfig``.
        engram: the memory.
        main: the main layers of a hybrid model's pattern, which only the arguments have.
    """
    ENGRAM.check(settings)

    def get(name: str) -> Any:
        return getattr(settings, name, None)

    main = main or main_pattern(get)
    last, layers = engram.layers[-1], get('num_layers')
    if main is not None:
        # What --num-layers says then counts for nothing.
        layers = len(main.replace('|', ''))
    if layers is not None and last > layers:
        raise ValueError(
            f'--engram-layers {last}: the model has {layers} layers, counted from 1; name one of '
            'them'
        )
    share = (get('seq_length') or engram.reach) // (get('tensor_model_parallel_size') or 1)
    if get('sequence_parallel') and get('seq_length') and share < engram.reach:
        raise ValueError(
            f'--sequence-parallel leaves {share} tokens to a rank, and the convolution of '
            f'--engram-layers reads the {engram.reach} before; use fewer tensor-parallel ranks'
        )
