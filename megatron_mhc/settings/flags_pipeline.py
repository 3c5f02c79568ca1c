"""The pipeline schedule of a command line, and what it makes of Megatron's own arguments."""

from __future__ import annotations

import argparse
import os
import re

from megatron_mhc.inputs.refusal import announce, is_first_rank
from megatron_mhc.inputs.values import flag_of
from megatron_mhc.schedules.inverted_v import CHUNKS, check_layout, even_layout, written_out
from megatron_mhc.schedules.live import live_at_peak
from megatron_mhc.schedules.mirrored import doubled, mirrored_layout
from megatron_mhc.schedules.pattern_stages import cut_pattern
from megatron_mhc.settings import step_plan
from megatron_mhc.settings.flag import flags_of, given, refuse_in_vain
from megatron_mhc.settings.hybrid_stages import main_pattern
from megatron_mhc.settings.names import PLANNED_SCHEDULES
from megatron_mhc.settings.pipeline import PipelineConfig, PipelineOptions
from megatron_mhc.settings.queues import CONNECTIONS
from megatron_mhc.settings.refused_pipeline import check_planned

# Compute, high priority, expert and stage communication, with room for data parallelism.
ENOUGH_CONNECTIONS = 8


def pipeline_config_from_args(args: argparse.Namespace) -> PipelineConfig | None:
    """The plan settings that ``args`` describes; None for a stock schedule.

    Raises:
        ValueError: flags that contradict each other, or that have no effect.
    """
    schedule = getattr(args, 'pipeline_schedule', None)
    asked = [(cls, name) for cls in (PipelineConfig, PipelineOptions) for name in given(args, cls)]
    flags = [flags_of(cls)[name] for cls, name in asked]
    refuse_in_vain(flags, 'schedule', '--pipeline-schedule', schedule or '1f1b')
    if schedule not in PLANNED_SCHEDULES:
        return None
    placement = getattr(args, 'pipeline_w_placement', None)
    if placement == 'slot' and schedule == 'dualpipev-w':
        raise ValueError(
            '--pipeline-w-placement slot contradicts --pipeline-schedule dualpipev-w: that is '
            'dualpipev with its weight gradients after the slot; use --pipeline-schedule dualpipev'
        )
    if placement == 'after':
        schedule = 'dualpipev-w'
    return PipelineConfig(
        schedule,
        getattr(args, 'pipeline_verify_steps', None) or 0,
        getattr(args, 'pipeline_live_bound', None),
    )


def check_recompute_stream(stream: str | None, pipeline: PipelineConfig | None) -> None:
    """Raise ValueError for a stream of high priority that nothing would overlap with."""
    if stream == 'high' and pipeline is None:
        raise ValueError(
            '--mhc-recompute-stream high has no effect with the stock schedules, whose backward '
            'waits for what it rebuilds; drop it, or choose --pipeline-schedule '
            f'{", ".join(PLANNED_SCHEDULES)}, which rebuild ahead of it'
        )


def resolve_pipeline(args: argparse.Namespace) -> PipelineConfig | None:
    """Check the schedule against the other arguments, and set those that follow from it.

    Called right after parsing, before Megatron validates its arguments. A V needs a layer layout
    with two chunks a rank, which is written into ``args.pipeline_model_parallel_layout``; on a line
    the layers are divided as Megatron divides them for 1F1B.

    Raises:
        ValueError: a pair that cannot be combined; the message has the alternative.
    """
    pipeline = pipeline_config_from_args(args)
    check_recompute_stream(getattr(args, 'mhc_recompute_stream', None), pipeline)
    if pipeline is not None or getattr(args, 'mhc_post_stream', None) == 'high':
        _advise_on_connections(args)
    schedule = getattr(args, 'pipeline_schedule', None)
    if pipeline is None:
        _check_chunks(args, schedule)
        return None
    check_planned(args, pipeline)
    if not pipeline.two_chunks:
        _check_chunks(args, '1f1b', pipeline.schedule)
    if args.micro_batch_size is None:
        raise ValueError(
            f'--micro-batch-size is missing: --pipeline-schedule {schedule} is planned for a '
            'number of microbatches; give it'
        )
    divided = ''
    if pipeline.on_v:
        divided = f'layers {_lay_out(args)} in stage order, '
        advise_on_optimizer_state(args, 'will be saved')
    if pipeline.mirrored:
        divided = f'two copies of the layers {_double(args)}, '
    ranks = args.pipeline_model_parallel_size
    recompute = getattr(args, 'mhc_recompute_layer_num', None) not in (None, 'none')
    for microbatches in _microbatch_counts(args):
        step_plan.check_numbers(pipeline.schedule, ranks, microbatches, pipeline.live_bound)
        # No rank begins a step without the first one, which has proved the plan by then.
        numbers = ranks, microbatches, False, recompute, pipeline.live_bound
        if is_first_rank():
            step_plan.prove(pipeline.schedule, *numbers)
        step_plan.promise(pipeline.schedule, *numbers)
    if is_first_rank():
        live = live_at_peak(pipeline.schedule, ranks, microbatches, CHUNKS, pipeline.live_bound)
        announce(
            f'pipeline schedule {pipeline.schedule}: {ranks} ranks, {microbatches} microbatches, '
            f'{divided}at most {max(live):g} microbatches in flight on a rank'
        )
    return pipeline


def _check_chunks(args: argparse.Namespace, schedule: str | None, name: str = '') -> None:
    """Raise ValueError for more or fewer chunks a rank than 1F1B or interleaved has.

    Args:
        args: parsed.
        schedule: ``1f1b`` or ``interleaved``; anything else has no chunks to check.
        name: of another schedule with the chunks of 1F1B.
    """
    named = getattr(args, 'pipeline_model_parallel_layout', None)
    chunked = named is not None or any(
        getattr(args, flag, None) is not None
        for flag in (
            'num_layers_per_virtual_pipeline_stage',
            'num_virtual_stages_per_pipeline_rank',
        )
    )
    pattern = main_pattern(vars(args).get)
    if pattern:
        # Megatron takes the chunks from it, and none of those flags.
        chunked = pattern.count('|') >= args.pipeline_model_parallel_size
    if schedule == 'interleaved' and not chunked:
        raise ValueError(
            '--pipeline-schedule interleaved needs several chunks a rank; '
            + (
                'end as many stages with | in --hybrid-layer-pattern'
                if pattern
                else 'add --num-virtual-stages-per-pipeline-rank 2'
            )
        )
    if named and name:
        chunked = written_out(named).count('|') >= args.pipeline_model_parallel_size
    if schedule == '1f1b' and chunked and (name or not named):
        raise ValueError(
            f'--pipeline-schedule {name or schedule} has one chunk a rank; drop the virtual-stage '
            f'flags, or | of {"the layout or " * bool(name)}--hybrid-layer-pattern, or use '
            f'--pipeline-schedule {"zb-v" if name else "interleaved"}'
        )


def _advise_on_connections(args: argparse.Namespace) -> None:
    connections = os.environ.get(CONNECTIONS, '8')
    if connections.isdigit() and int(connections) < ENOUGH_CONNECTIONS:
        remedy = f'set it to {ENOUGH_CONNECTIONS} or more (32 is common)'
        shared = [
            name
            for name in ('tensor_model_parallel_size', 'context_parallel_size')
            if (getattr(args, name, None) or 1) > 1
        ]
        if connections == '1' and shared:
            remedy = (
                f'from Blackwell on {remedy}; on GPUs before it Megatron demands 1 for '
                f'{" and ".join(map(flag_of, shared))}, so use 1 there, with more pipeline or '
                'expert ranks in its place, or do without the overlap'
            )
        announce(
            f'{CONNECTIONS}={connections}: streams share that many hardware queues, '
            f'so stage communication and F_post,res can be stuck behind other compute; {remedy}'
        )


def advise_on_optimizer_state(args: argparse.Namespace, when: str) -> None:
    """Say that optimizer state of a V is bound to its layout, unless a flag of Megatron's is set.

    Args:
        args: of a run on the inverted V.
        when: what has become of the state, in words.
    """
    sharded = getattr(args, 'use_distributed_optimizer', False) and not args.no_save_optim
    if args.save and sharded and not args.dist_ckpt_optim_fully_reshardable:
        announce(
            f'--use-distributed-optimizer: optimizer state {when} as --pipeline-schedule '
            f'{args.pipeline_schedule} and this layout divide it; another schedule, TP or PP can '
            'then resume with --no-load-optim only ("Global shape mismatch" otherwise); add '
            '--dist-ckpt-optim-fully-reshardable to the run that saves'
        )


def _lay_out(args: argparse.Namespace) -> str:
    """The layers of every stage, in the argument where Megatron looks for them."""
    args.num_virtual_stages_per_pipeline_rank = None
    args.num_layers_per_virtual_pipeline_stage = None
    ranks, predicted = args.pipeline_model_parallel_size, args.mtp_num_layers or 0
    # The name of the pattern that is given; the second is older.
    for name in ('hybrid_layer_pattern', 'hybrid_override_pattern'):
        if pattern := getattr(args, name, None):
            cut = cut_pattern(pattern, ranks)
            setattr(args, name, cut)
            return cut
    if args.pipeline_model_parallel_layout is not None:
        check_layout(args.pipeline_model_parallel_layout, ranks, args.num_layers, predicted)
        return str(args.pipeline_model_parallel_layout)
    if args.num_layers is None:
        raise ValueError(
            f'--pipeline-schedule {args.pipeline_schedule} divides the layers before a checkpoint '
            'is read: give --num-layers, --pipeline-model-parallel-layout or --hybrid-layer-pattern'
        )
    first, last = 'E', 'm' * predicted + 'L'
    # Megatron counts embedding and loss as a layer each where these flags are set.
    embedding = args.account_for_embedding_in_pipeline_split
    loss = args.account_for_loss_in_pipeline_split
    args.account_for_embedding_in_pipeline_split = False
    args.account_for_loss_in_pipeline_split = False
    ends = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    if (embedding or loss) and ends != (None, None):
        raise ValueError(
            '--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split '
            'count layers, --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-'
            'layers set them; use one or the other'
        )
    counted = int(embedding), int(loss)
    layout = even_layout(args.num_layers, ranks, first, last, *counted, *ends)
    args.pipeline_model_parallel_layout = layout
    return layout


def _double(args: argparse.Namespace) -> str:
    """The layers of every stage of a copy; those of both in the argument where Megatron looks."""
    ends = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    ranks = args.pipeline_model_parallel_size
    layout = mirrored_layout(args.pipeline_model_parallel_layout, args.num_layers, ranks, *ends)
    args.pipeline_model_parallel_layout = doubled(layout)
    return layout


def _microbatch_counts(args: argparse.Namespace) -> list[int]:
    """Microbatches of a step: of every batch size, or the smallest one too where it ramps up."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    model *= getattr(args, 'context_parallel_size', 1)
    replicas = max(1, int(os.environ.get('WORLD_SIZE', '1')) // model)
    batches = [args.global_batch_size or args.micro_batch_size * replicas]
    if getattr(args, 'rampup_batch_size', None):
        batches.insert(0, int(args.rampup_batch_size[0]))
    steps = getattr(args, 'step_batch_size_schedule', None) or ''
    # ``0:768 250B:1536``; what is no such thing, Megatron refuses.
    batches = [int(size) for size in re.findall(r':([1-9]\d{0,8})(?!\d)', steps)] or batches
    return [max(1, batch // (args.micro_batch_size * replicas)) for batch in batches]
