"""What a schedule that is run from a plan cannot be combined with."""

from __future__ import annotations

from megatron_mhc.schedules.inverted_v import CHUNKS
from megatron_mhc.settings.constraint import (
    Constraint,
    Refusals,
    Setting,
    cuda_graphs,
    hybrid_model,
    offloads,
    predicts,
    shards_parameters,
)
from megatron_mhc.settings.hybrid_stages import LAYOUT_BESIDE_PATTERN
from megatron_mhc.settings.names import LINE_SCHEDULES, MIRRORED_SCHEDULES, V_SCHEDULES
from megatron_mhc.settings.pipeline import PipelineConfig


def _other_than_two_chunks(get: Setting) -> bool:
    each, ranks = get('num_layers_per_virtual_pipeline_stage'), get('pipeline_model_parallel_size')
    return each is not None and each * ranks * CHUNKS != get('num_layers')


_ROWS = (
    Constraint(
        '--pipeline-model-parallel-size 1',
        lambda get: (get('pipeline_model_parallel_size') or 1) < 2,
        'there is no pipeline to schedule',
        'use at least 2 pipeline ranks',
    ),
    Constraint(
        '--cuda-graph-impl / --enable-cuda-graph',
        cuda_graphs,
        'graphs are captured in the order of the stock schedules',
        'use --cuda-graph-impl none',
    ),
    Constraint(
        '--use-megatron-fsdp / --use-torch-fsdp2',
        shards_parameters,
        'parameters are gathered and freed by hooks that expect a whole backward',
        'use --use-distributed-optimizer',
    ),
    Constraint(
        '--overlap-param-gather-with-optimizer-step',
        lambda get: bool(get('overlap_param_gather_with_optimizer_step')),
        'it updates one chunk ahead of the other, the one that the stock schedule begins with',
        'drop the flag; --overlap-param-gather works',
    ),
    Constraint(
        '--overlap-moe-expert-parallel-comm',
        lambda get: bool(get('overlap_moe_expert_parallel_comm')),
        'it merges passes in an order of its own',
        'drop the flag: the fused slots of dualpipev and dualpipev-w overlap the same all-to-all',
    ),
    Constraint(
        '--moe-shared-expert-overlap / --overlap-dispatch-backward-with-experts-wgrad',
        lambda get: bool(
            get('moe_shared_expert_overlap') or get('overlap_dispatch_backward_with_experts_wgrad')
        ),
        'they order the same all-to-all on streams of their own',
        'drop the flag',
    ),
    Constraint(
        '--delay-wgrad-compute',
        lambda get: bool(get('delay_wgrad_compute')),
        'the plan says when weight gradients are computed',
        'drop the flag',
    ),
    Constraint(
        '--use-transformer-engine-op-fuser',
        lambda get: bool(get('use_transformer_engine_op_fuser')),
        'fused operations hide the layers whose weight gradients the plan puts off',
        'drop the flag',
    ),
    Constraint(
        '--tp-comm-overlap',
        lambda get: bool(get('tp_comm_overlap')),
        'Transformer Engine cannot put off weight gradients that overlap communication',
        'drop the flag',
    ),
    Constraint(
        '--defer-embedding-wgrad-compute',
        lambda get: bool(get('defer_embedding_wgrad_compute')),
        'the plan says when weight gradients are computed',
        'drop the flag',
    ),
    Constraint(
        '--fine-grained-activation-offloading / --cpu-offloading-num-layers',
        offloads,
        'offloaded activations are fetched in the order of the stock schedules',
        'use selective recomputation',
    ),
    Constraint(
        '--hybrid-context-parallel',
        lambda get: bool(get('hybrid_context_parallel')),
        'its groups change from one microbatch to the next',
        'drop the flag',
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
        'a YAML configuration discards every command-line value, the layout among them',
        'pass the settings as flags',
    ),
    Constraint(
        '--num-microbatches-with-partial-activation-checkpoints',
        lambda get: get('num_microbatches_with_partial_activation_checkpoints') is not None,
        'its window follows the warm-up of the stock schedules',
        'drop the flag',
    ),
)
# Of two chunks a rank alone.
_OF_TWO = (
    Constraint(
        '--fp8-recipe delayed',
        lambda get: bool(get('fp8')) and get('fp8_recipe') in (None, 'delayed'),
        'a pass of one chunk moves the amax histories of both on, so scales depend on the order',
        'use --fp8-recipe tensorwise, blockwise or mxfp8',
    ),
    Constraint(
        '--ckpt-format torch',
        lambda get: get('ckpt_format') == 'torch',
        'it numbers chunks, not layers, so another schedule would load the wrong ones',
        'use --ckpt-format torch_dist',
    ),
)
_ON_V = (
    Constraint(
        '--num-layers-per-virtual-pipeline-stage',
        _other_than_two_chunks,
        'a V has two chunks a rank',
        'drop the flag, or name the layers with --pipeline-model-parallel-layout',
    ),
    Constraint(
        '--num-virtual-stages-per-pipeline-rank',
        lambda get: get('num_virtual_stages_per_pipeline_rank') not in (None, 2),
        'a V has two chunks a rank',
        'drop the flag',
    ),
    LAYOUT_BESIDE_PATTERN,
)
_ON_MIRRORED = (
    Constraint(
        '--num-layers-per-virtual-pipeline-stage / --num-virtual-stages-per-pipeline-rank',
        lambda get: any(
            get(name) is not None
            for name in (
                'num_layers_per_virtual_pipeline_stage',
                'num_virtual_stages_per_pipeline_rank',
            )
        ),
        'a copy of the model has one stage a rank',
        'drop the flag, or name the layers with --pipeline-model-parallel-layout',
    ),
    Constraint(
        '--account-for-embedding-in-pipeline-split / --account-for-loss-in-pipeline-split',
        lambda get: bool(
            get('account_for_embedding_in_pipeline_split')
            or get('account_for_loss_in_pipeline_split')
        ),
        'the rank of an end holds the first stage and the last one, so neither is to be shortened '
        'by itself',
        'name the layers with --pipeline-model-parallel-layout',
    ),
    Constraint(
        '--hybrid-layer-pattern',
        hybrid_model,
        'a hybrid model picks the segment of a chunk by rank and virtual stage, and the copies '
        'have each segment on two ranks',
        'use --pipeline-schedule dualpipev-w, or a GPT model',
    ),
    Constraint(
        '--mtp-num-layers',
        predicts,
        'the embedding would have four copies, two of them on each end',
        'use --pipeline-schedule dualpipev-w',
    ),
    Constraint(
        '--moe-router-load-balancing-type global_aux_loss',
        lambda get: 'global_aux_loss' in str(get('moe_router_load_balancing_type')),
        'it counts the tokens of all data-parallel ranks, and a copy sees half of the microbatches',
        'use aux_loss, seq_aux_loss or none',
    ),
    Constraint(
        '--mhc-monitor / --mhc-alarm',
        lambda get: bool(get('mhc_monitor')) or get('mhc_alarm') not in (None, 'off'),
        "composite maps are products of one token's maps over all stages, and a rank's two stages "
        'see other tokens',
        'use --pipeline-schedule dualpipev-w, or drop the flag',
    ),
)
_OTHERWISE = 'use --pipeline-schedule 1f1b'
INVERTED_V = Refusals('--pipeline-schedule {}', _OTHERWISE, _ROWS + _OF_TWO + _ON_V, V_SCHEDULES)
MIRRORED = Refusals(
    '--pipeline-schedule {}', _OTHERWISE, _ROWS + _OF_TWO + _ON_MIRRORED, MIRRORED_SCHEDULES
)
ON_LINE = Refusals('--pipeline-schedule {}', _OTHERWISE, _ROWS, LINE_SCHEDULES)


def check_planned(settings: object, pipeline: PipelineConfig) -> None:
    """Raise ValueError for the first refused pair found in ``settings``.

    Args:
        settings: parsed arguments or a ``TransformerConfig``.
        pipeline: the schedule.
    """
    rows = MIRRORED if pipeline.mirrored else INVERTED_V if pipeline.on_v else ON_LINE
    rows.check(settings, pipeline.schedule)
