"""What dense connections cannot be combined with, beside what no residual topology can."""

from __future__ import annotations

from megatron_mhc.settings.constraint import (
    Constraint,
    Refusals,
    full_recompute,
    predicts,
)
from megatron_mhc.settings.hybrid_stages import main_pattern

_ROWS = (
    Constraint(
        '--pipeline-model-parallel-size > 1',
        lambda get: (get('pipeline_model_parallel_size') or 1) > 1,
        'every stage would have to send the outputs of all layers before it',
        'use tensor, sequence or data parallelism',
    ),
    Constraint(
        '--transformer-impl transformer_engine',
        # Of the command line alone: a model config says so by default, whatever the layer spec has.
        lambda get: get('residual_type') and get('transformer_impl') == 'transformer_engine',
        'its fused norm and projection have one input for query, key and value',
        'add --transformer-impl local',
    ),
    Constraint(
        "--multi-latent-attention / '+' and 'D' in --hybrid-layer-pattern",
        lambda get: (
            bool(get('multi_latent_attention')) or bool(set('+D') & set(main_pattern(get) or ''))
        ),
        'its key and value come from one latent',
        "drop the flag, or use '*'",
    ),
    Constraint(
        '--attention-output-gate',
        lambda get: bool(get('attention_output_gate')),
        'the gate would need a fifth input, which the paper does not define',
        'drop the flag',
    ),
    Constraint(
        '--num-query-groups below --tensor-model-parallel-size',
        # The command line has one group by default, and a flag that says whether it counts.
        lambda get: (
            get('group_query_attention') is not False
            and 0 < (get('num_query_groups') or 0) < (get('tensor_model_parallel_size') or 1)
        ),
        'ranks share the keys of a group',
        'use at least as many query groups as tensor-parallel ranks',
    ),
    Constraint(
        '--mtp-num-layers',
        predicts,
        'dense connections end at the final norm',
        'drop the flag',
    ),
    Constraint(
        '--fine-grained-activation-offloading',
        lambda get: bool(get('fine_grained_activation_offloading')),
        'it releases the input of a layer, which later layers still read',
        'use --recompute-granularity selective',
    ),
    Constraint(
        '--recompute-granularity full',
        full_recompute,
        'a recomputed layer gets its input without the outputs of earlier layers',
        'use --recompute-granularity selective',
    ),
    Constraint(
        '--recompute-modules layernorm',
        lambda get: (
            get('recompute_granularity') == 'selective'
            and 'layernorm' in (get('recompute_modules') or ())
        ),
        'the norm before attention has three inputs',
        'leave layernorm out of the modules',
    ),
    Constraint(
        '--mhc-post-stream high',
        lambda get: get('mhc_post_stream') == 'high',
        'the sum over all outputs comes right after the MLP, with nothing to overlap',
        'drop the flag',
    ),
    Constraint(
        '--mhc-monitor / --mhc-alarm',
        lambda get: bool(get('mhc_monitor')) or get('mhc_alarm') not in (None, 'off'),
        'there is no H_res to monitor',
        'drop the flag, or use --residual-type mhc',
    ),
)
MUDD = Refusals('--residual-type {}', 'use --residual-type standard', _ROWS, ('mudd',))
