"""What no residual topology but the standard one can be combined with."""

from __future__ import annotations

from megatron_mhc.settings.constraint import Constraint, Refusals, Setting
from megatron_mhc.settings.hybrid_stages import LAYOUT_BESIDE_PATTERN, main_pattern
from megatron_mhc.settings.names import RESIDUAL_TYPES


def _batched_p2p_on_two_virtual_stages(get: Setting) -> bool:
    """The model config has ``batch_p2p_comm``; the command line only its inverse."""
    interleaved = get('virtual_pipeline_model_parallel_size') is not None or (
        get('num_layers_per_virtual_pipeline_stage') is not None
        or get('num_virtual_stages_per_pipeline_rank') is not None
        or (main_pattern(get) or '').count('|') > 1
    )
    batched = get('batch_p2p_comm')
    if batched is None:
        batched = get('overlap_p2p_comm') is False
    return interleaved and get('pipeline_model_parallel_size') == 2 and bool(batched)


def _recomputes_biased_mlp(get: Setting) -> bool:
    """A dense MLP with biases, recomputed by itself."""
    experts = get('num_experts') or get('num_moe_experts')
    dense = not experts or get('moe_layer_freq') not in (None, 1)
    chosen = get('recompute_granularity') == 'selective' and get('recompute_modules') or ()
    return bool(dense and 'mlp' in chosen and get('add_bias_linear'))


DECOUPLED = '--decoupled-lr with --mhc-mapping-optimizer scalar'
WHY_NOT_DECOUPLED = (
    "the only mark by which Megatron keeps a matrix from Muon is the embedding's, and marked phi "
    'would get the decoupled rate'
)

_ROWS = (
    Constraint(
        '--no-overlap-p2p-communication with --pipeline-model-parallel-size 2 and virtual stages',
        _batched_p2p_on_two_virtual_stages,
        'batched p2p pairs the two messages of a two-rank ring the wrong way round, silently',
        'leave p2p overlap on (batch_p2p_comm=False)',
    ),
    LAYOUT_BESIDE_PATTERN,
    Constraint(
        '--delay-wgrad-compute with --overlap-moe-expert-parallel-comm',
        lambda get: bool(get('delay_wgrad_compute') and get('overlap_moe_expert_parallel_comm')),
        'layers with n streams run whole, and their weight gradients with them',
        'drop --delay-wgrad-compute, or use --pipeline-schedule dualpipev-w',
    ),
    Constraint(
        '--transformer-impl inference_optimized / --inference-fuse-tp-communication',
        lambda get: (
            get('transformer_impl') == 'inference_optimized'
            or bool(get('inference_fuse_tp_communication'))
        ),
        'the residual is added inside the fused linear layers',
        'use --transformer-impl transformer_engine or local',
    ),
    Constraint(
        '--fused-residual-rmsnorm',
        lambda get: bool(get('fused_residual_rmsnorm')),
        'it fuses the single-stream residual add into the norm',
        'drop the flag',
    ),
    Constraint(
        '--recompute-modules mlp without --disable-bias-linear',
        _recomputes_biased_mlp,
        'the bias that a recomputed MLP returns leads back to it, and the backward never ends, '
        'in a standard model either',
        'add --disable-bias-linear, or recompute other modules',
    ),
    Constraint(
        '--cpu-offloading-num-layers',
        lambda get: bool(get('cpu_offloading') or get('cpu_offloading_num_layers')),
        "its commit between two layers passes on the streams' tensor alone, without what a layer "
        'leaves on it for the next',
        'use --fine-grained-activation-offloading, or recomputation',
    ),
    Constraint(
        '--use-megatron-fsdp',
        lambda get: bool(get('use_megatron_fsdp')),
        'under it (0.19.2) fp32 mapping parameters beside bf16 ones were seen with wrong values, '
        'without a word',
        'use --use-distributed-optimizer',
    ),
    Constraint(
        '--use-torch-fsdp2',
        lambda get: bool(get('use_torch_fsdp2')),
        'it wants one type for all parameters of a unit, and those of mappings stay fp32',
        'use --use-distributed-optimizer',
    ),
    Constraint(
        DECOUPLED,
        lambda get: get('decoupled_lr') is not None and get('mhc_mapping_optimizer') == 'scalar',
        WHY_NOT_DECOUPLED,
        'drop one of the two',
    ),
    Constraint(
        '--mhc-mapping-optimizer scalar with --optimizer adam or sgd',
        lambda get: (
            get('optimizer') in ('adam', 'sgd') and get('mhc_mapping_optimizer') == 'scalar'
        ),
        'it says which of two optimizers trains phi, but there is only one for all parameters',
        'drop --mhc-mapping-optimizer or use --optimizer muon',
    ),
    Constraint(
        '--export-kd-teacher-load',
        lambda get: bool(get('export_kd_teacher_load')),
        'distillation sets the shapes of pipeline messages itself',
        'drop the flag',
    ),
    Constraint(
        '--yaml-cfg',
        lambda get: get('yaml_cfg') is not None,
        'a YAML configuration discards every command-line value, --residual-type among them',
        'pass the settings as flags',
    ),
    Constraint(
        "Megatron's own hyper-connections (--enable-mhc-connections / --enable-hyper-connections)",
        lambda get: bool(get('enable_mhc_connections') or get('enable_hyper_connections')),
        'the streams would be widened twice',
        'keep one of the two flags',
    ),
)
RESIDUAL = Refusals('--residual-type {}', 'use --residual-type standard', _ROWS, RESIDUAL_TYPES[1:])
