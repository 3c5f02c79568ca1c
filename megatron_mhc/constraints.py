"""What hyper-connections cannot be combined with: one table for the command line and the model.

Each row is checked on the parsed arguments, before any process group exists, and again on the
``TransformerConfig`` when a model is built, for callers that use no command line. Megatron gives a
setting the same name in both; a name that one side lacks reads as None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mhc.config import ResidualConfig

Setting = Callable[[str], Any]


@dataclass(frozen=True)
class Constraint:
    """A refused pair: what is set, why it cannot work with n streams, and what to do."""

    flag: str
    violated: Callable[[Setting], bool]
    reason: str
    remedy: str


def _batched_p2p_on_two_virtual_stages(get: Setting) -> bool:
    """The model config has ``batch_p2p_comm``; the command line only its inverse."""
    interleaved = get('virtual_pipeline_model_parallel_size') is not None or (
        get('num_layers_per_virtual_pipeline_stage') is not None
        or get('num_virtual_stages_per_pipeline_rank') is not None
    )
    batched = get('batch_p2p_comm')
    if batched is None:
        batched = get('overlap_p2p_comm') is False
    return interleaved and get('pipeline_model_parallel_size') == 2 and bool(batched)


def cuda_graphs(get: Setting) -> bool:
    """By the names of every release."""
    older = get('enable_cuda_graph') or get('external_cuda_graph')
    return get('cuda_graph_impl') not in (None, 'none') or bool(older)


def offloads(get: Setting) -> bool:
    whole_layers = get('cpu_offloading') or get('cpu_offloading_num_layers')
    return bool(whole_layers or get('fine_grained_activation_offloading'))


def shards_parameters(get: Setting) -> bool:
    return bool(get('use_megatron_fsdp') or get('use_torch_fsdp2'))


def hybrid_model(get: Setting) -> bool:
    return bool(get('hybrid_layer_pattern') or get('hybrid_override_pattern'))


DECOUPLED = '--decoupled-lr with --mhc-mapping-optimizer scalar'
WHY_NOT_DECOUPLED = (
    "the only mark by which Megatron keeps a matrix from Muon is the embedding's, and marked phi "
    'would get the decoupled rate'
)

CONSTRAINTS = (
    Constraint(
        '--no-overlap-p2p-communication with --pipeline-model-parallel-size 2 and virtual stages',
        _batched_p2p_on_two_virtual_stages,
        'batched p2p pairs the two messages of a two-rank ring the wrong way round, silently',
        'leave p2p overlap on (batch_p2p_comm=False)',
    ),
    Constraint(
        '--overlap-moe-expert-parallel-comm',
        lambda get: bool(get('overlap_moe_expert_parallel_comm')),
        'its schedule calls parts of a layer by hand and adds the residual itself',
        'drop the flag',
    ),
    Constraint(
        '--cuda-graph-impl / --enable-cuda-graph',
        cuda_graphs,
        'captured layers use static inputs of one stream',
        'use --cuda-graph-impl none',
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
        '--cpu-offloading-num-layers',
        lambda get: bool(get('cpu_offloading') or get('cpu_offloading_num_layers')),
        'offloading whole layers is not tested with n streams',
        'use activation recomputation instead',
    ),
    Constraint(
        '--fine-grained-activation-offloading',
        lambda get: bool(get('fine_grained_activation_offloading')),
        'it releases the residual of a layer, here a sublayer input, which only a GPU can test',
        'use activation recomputation instead',
    ),
    Constraint(
        '--use-megatron-fsdp / --use-torch-fsdp2',
        shards_parameters,
        'fully sharded parameters are not tested with fp32 mapping parameters',
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
        'it says which of two optimizers trains phi, and there is one for all parameters',
        'drop --mhc-mapping-optimizer or use --optimizer muon',
    ),
    Constraint(
        '--hybrid-layer-pattern',
        hybrid_model,
        'only GPTModel is widened to n streams, not HybridModel',
        'use a GPT layer spec',
    ),
    Constraint(
        '--export-kd-teacher-load',
        lambda get: bool(get('export_kd_teacher_load')),
        'distillation adjusts the shapes of pipeline messages by itself',
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


def check_constraints(settings: object, residual: ResidualConfig) -> None:
    """Raise ValueError for the first refused pair found in ``settings``.

    Args:
        settings: parsed arguments or a ``TransformerConfig``.
        residual: with ``standard`` everything is allowed.
    """
    if not residual.enabled:
        return

    def get(name: str) -> Any:
        return getattr(settings, name, None)

    kind = f'--residual-type {residual.residual_type}'
    _check(CONSTRAINTS, get, kind, 'use --residual-type standard')
    if residual.residual_type == 'mudd':
        from megatron_mhc.mudd.constraints import MUDD_CONSTRAINTS

        _check(MUDD_CONSTRAINTS, get, kind, 'use --residual-type standard')
    if residual.single_pass:
        from megatron_mhc.single_pass import SINGLE_PASS_CONSTRAINTS

        _check(SINGLE_PASS_CONSTRAINTS, get, '--mhc-single-pass', 'drop --mhc-single-pass')


def _check(table: tuple[Constraint, ...], get: Setting, beside: str, otherwise: str) -> None:
    for constraint in table:
        if constraint.violated(get):
            raise ValueError(
                f'{constraint.flag} cannot be combined with {beside}: {constraint.reason}; '
                f'{constraint.remedy}, or {otherwise}'
            )
