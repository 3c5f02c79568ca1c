"""Flags of the pipeline schedules: what follows from them, and what is refused in one line."""

from __future__ import annotations

import argparse
import re
import types

import pytest

from megatron_mhc.bootstrap import asks_for_a_v
from megatron_mhc.inputs import refusal
from megatron_mhc.schedules.inverted_v import (
    balanced,
    check_layout,
    even_layout,
    holder_of,
    stage_of,
)
from megatron_mhc.settings import step_plan
from megatron_mhc.settings.flags_pipeline import pipeline_config_from_args, resolve_pipeline

PP4 = '--num-layers 16 --pipeline-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 8'
V = f'{PP4} --pipeline-schedule dualpipev'
DIST = '--use-distributed-optimizer --overlap-grad-reduce'
MHC = '--residual-type mhc'


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')


def test_a_stock_schedule_changes_nothing(parse):
    from megatron_mhc.patches import engine

    args = parse(*PP4.split(), '--pipeline-schedule', '1f1b')
    assert pipeline_config_from_args(args) is None
    assert args.pipeline_model_parallel_layout is None
    assert not {'schedule', 'gpt-model', 'v-layout'} & set(engine.applied())


def test_a_v_gets_a_layout_in_stage_order(parse, capsys):
    refusal.announce.cache_clear()
    args = parse(*V.split(), *f'{MHC} --mhc-recompute-layer-num stage'.split())
    assert args.pipeline_model_parallel_layout == 'Ett|tt|tt|tt|tt|tt|tt|ttL'
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if 'schedule dualpipev' in line
    ]
    assert '4 ranks, 8 microbatches' in line and '4.5 microbatches in flight on a rank' in line
    # Two chunks are what a V has.
    again = parse(*V.split(), '--num-virtual-stages-per-pipeline-rank', '2')
    assert again.num_virtual_stages_per_pipeline_rank is None
    own = parse(*V.split(), '--pipeline-model-parallel-layout', 'Ettt|t|tt|tt|tt|tt|tt|ttL')
    assert own.pipeline_model_parallel_layout == 'Ettt|t|tt|tt|tt|tt|tt|ttL'


# On four ranks; the pattern says where stages end, or has as many layers in each.
PATTERN = f'{PP4.replace("--num-layers 16 ", "")} --pipeline-schedule zb-v --hybrid-layer-pattern'


@pytest.mark.parametrize(
    ('pattern', 'stages'),
    [
        ('*-' * 8, '|'.join(['*-'] * 8)),
        ('*|-|**||*-|-|-*|', '*|-|**||*-|-|-*|'),
        ('*-*-*-*-/*-/*-', '*|-|*|-|*|-|*|-/*-/*-'),
    ],
)
def test_a_v_of_a_hybrid_pattern(parse, capsys, pattern, stages):
    refusal.announce.cache_clear()
    flags = f'{PATTERN} {pattern} --position-embedding-type rope'
    args = parse(*flags.split())
    assert args.hybrid_layer_pattern == stages and args.pipeline_model_parallel_layout is None
    assert f'layers {stages} in stage order' in capsys.readouterr().out
    older = parse(*flags.replace('layer-pattern', 'override-pattern').split())
    assert older.hybrid_override_pattern == stages and older.hybrid_layer_pattern is None


def test_ends_of_the_model_count_as_layers(parse):
    flags = V.replace('--num-layers 16', '--num-layers 14').split()
    ends = ('--account-for-embedding-in-pipeline-split', '--account-for-loss-in-pipeline-split')
    args = parse(*flags, *ends)
    assert args.pipeline_model_parallel_layout == 'Et|tt|tt|tt|tt|tt|tt|tL'
    assert not args.account_for_loss_in_pipeline_split


def test_a_schedule_on_a_line_leaves_the_layers_to_megatron(parse, capsys):
    refusal.announce.cache_clear()
    args = parse(*ZB_H1.split())
    assert args.pipeline_model_parallel_layout is None
    out = capsys.readouterr().out
    assert 'zb-h1: 4 ranks, 8 microbatches, at most 4 microbatches in flight on a rank' in out
    assert not pipeline_config_from_args(
        parse(*f'{PP4} --pipeline-schedule 1f1b-overlap'.split())
    ).on_v
    own = parse(*ZB_H1.split(), '--pipeline-model-parallel-layout', 'Ettt|tttt*2|tttt|tL')
    assert not pipeline_config_from_args(own).on_v


def test_a_bound_on_what_is_in_flight(parse, capsys):
    refusal.announce.cache_clear()
    flags = f'{PP4} --pipeline-schedule v-bound --pipeline-live-bound 3.7'
    args = parse(*flags.split())
    assert pipeline_config_from_args(args).live_bound == 3.7
    assert 'at most 3.5 microbatches in flight on a rank' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'layout'),
    [
        ('--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3', 'Et|tttL'),
        ('--decoder-last-pipeline-num-layers 2', 'Ett|ttL'),
        ('--num-layers-per-virtual-pipeline-stage 2', 'Ett|ttL'),
    ],
)
def test_layers_of_the_ends_are_those_of_the_end_stages(parse, flags, layout):
    args = parse(*V.split(), *flags.split())
    first, last = layout.split('|')
    assert args.pipeline_model_parallel_layout == '|'.join([first, *['tt'] * 6, last])
    assert args.decoder_first_pipeline_num_layers is None


def test_weight_gradients_after_the_slot_is_dualpipev_w(parse):
    args = parse(*V.split(), '--pipeline-w-placement', 'after')
    assert pipeline_config_from_args(args).schedule == 'dualpipev-w'


# Copies of the word embedding: tied output layers and prediction layers.
MTP = f'{PP4} --mtp-num-layers 1'
ZB_H1 = f'{PP4} --pipeline-schedule zb-h1'
LAST, ALONE = 'Ett|tt|tt|tt|tt|tt|tt|tmL', 'Ett|tt|tt|tt|m|||L'
UNTIED = '--untie-embeddings-and-output-weights'

REFUSED = {
    f'{MTP} --save x': f'can neither save nor load this model, as it gives the last stage an output'
    f' weight that nothing reads; add {UNTIED}',
    f'{MTP} --load x --pipeline-model-parallel-layout {LAST}': f'add {UNTIED}',
    f'{MTP} --pipeline-model-parallel-layout {ALONE}': f'ranks 0 and 3 hold 3 copies of the word '
    f'embedding, which the all-reduce between ranks cannot keep equal, as it takes one copy of '
    f'every rank in its group; put m beside L, or {UNTIED}',
    f'{MTP} {MHC} --pipeline-model-parallel-layout {ALONE}': 'ranks 0 and 3 hold 3 copies',
    f'{MTP} --pipeline-schedule zb-v {UNTIED} --pipeline-model-parallel-layout '
    'Ett|ttt|ttt|tt|ttt|ttt|m|L': 'ranks 2 and 3 hold 2 copies',
    f'{V} --global-batch-size 7': 'dualpipev needs at least 2 x pp = 8 microbatches, got 7: use',
    f'{V} --rampup-batch-size 4 4 100': 'at least 2 x pp = 8 microbatches, got 4',
    f'{V} --num-layers 18': "-layout 'Ett|tt|tt|ttt|ttt|tt|tt|ttL'",
    f'{V} --num-layers 6': 'use at most 3 pipeline ranks',
    f'{V} --pipeline-model-parallel-size 1': '--pipeline-model-parallel-size 1 cannot be combined',
    f'{V} {DIST} --overlap-param-gather --overlap-param-gather-with-optimizer-step': 'updates one '
    'chunk ahead of the other',
    f'{V} --fp8-format hybrid': '--fp8-recipe delayed cannot be combined',
    f'{V} --fp8-format e4m3 --fp8-recipe delayed': 'use --fp8-recipe tensorwise',
    f'{V} --use-transformer-engine-op-fuser': '--use-transformer-engine-op-fuser',
    f'{V} --tp-comm-overlap': 'cannot put off weight gradients',
    f'{V} --delay-wgrad-compute': 'the plan says when',
    f'{V} --fine-grained-activation-offloading': 'fetched in the order of the stock schedules',
    f'{V} --ckpt-format torch': 'use --ckpt-format torch_dist',
    f'{V} --num-virtual-stages-per-pipeline-rank 4': 'a V has two chunks a rank',
    f'{V} --decoder-first-pipeline-num-layers 3': '13 layers do not divide evenly into the other 7 '
    'stages of a V; change them, or name the layers with --pipeline-model-parallel-layout',
    f'{V} --decoder-last-pipeline-num-layers 2 --account-for-loss-in-pipeline-split': 'one or the',
    f'{V} --num-layers-per-virtual-pipeline-stage 4': 'a V has two chunks a rank',
    f'{V} --use-megatron-fsdp': 'use --use-distributed-optimizer',
    f'{V} --mhc-recompute-layer-num stage': 'no effect with --residual-type standard',
    f'{V} {MHC} --mhc-recompute-stream high': 'without --mhc-recompute-layer-num',
    f'{V} --pipeline-verify-steps -1': '--pipeline-verify-steps -1',
    f'{PP4} --pipeline-schedule zb-v --pipeline-w-placement slot': 'no effect with',
    f'{PP4} --pipeline-schedule dualpipev-w --pipeline-w-placement slot': 'contradicts',
    f'{PP4} --pipeline-verify-steps 1': '--pipeline-verify-steps has no effect with',
    f'{PP4} --pipeline-schedule interleaved': 'add --num-virtual-stages-per-pipeline-rank 2',
    f'{PP4} --pipeline-schedule 1f1b --num-virtual-stages-per-pipeline-rank 2': 'use --pipeline-',
    f'{V} --global-batch-size 100000000': '100000000 microbatches x 2 chunks are more than 1048576',
    f'{V} --micro-batch-size 0': '--micro-batch-size 0: wanted',
    f'{V} --micro-batch-size -1': '--micro-batch-size -1',
    f'{V} --global-batch-size -8': '--global-batch-size -8',
    f'{V} --tensor-model-parallel-size 0': '--tensor-model-parallel-size 0',
    f'{PATTERN} *-*-|*-*-|*-*-|*-*-': '4 stages, but a V has 8 on 4 pipeline ranks; separate them '
    "by |, for example '*-|*-|*-|*-|*-|*-|*-|*-'",
    f'{PATTERN} *-*-*-*-*-*-': '12 layers do not divide into the 8 stages of a V on 4 pipeline '
    "ranks; separate them by |, for example '*|-|*-|*-|*-|*-|*|-'",
    f'{PATTERN} *-*-': "for example '||*|-|*|-||'",
    f'{PATTERN} *-x-*-*-': "'x' is no layer",
    f'{PATTERN} *-*-*-*-/*-': '--position-embedding-type rope or none',
    f'{PATTERN} *-*-*-*- --mtp-num-layers 1': "0 parts behind '/', but --mtp-num-layers 1",
    f'{PATTERN} *-*-*-*- --pipeline-model-parallel-layout {LAST}': 'says itself which layers',
    f'{PP4} --pipeline-schedule v-bound --pipeline-live-bound 1': '--pipeline-live-bound 1: no '
    'schedule without idle ranks holds at most 1 microbatches in flight on 4 ranks, as one ne',
    f'{PP4} --pipeline-schedule zb-v --pipeline-live-bound 3': 'it belongs to v-bound; drop it or',
    f'{PP4} --pipeline-schedule v-bound --pipeline-live-bound 0': 'a finite number above 0,',
    f'{ZB_H1} --num-virtual-stages-per-pipeline-rank 2': 'zb-h1 has one chunk a rank; drop the',
    f'{ZB_H1} --pipeline-model-parallel-layout {LAST}': 'or | of the layout or --hybrid-layer-patt',
    f'{ZB_H1} --overlap-moe-expert-parallel-comm': 'merges passes in an order of its own; drop the',
    f'{PP4} --pipeline-schedule dualpipe': 'argument --pipeline-schedule: invalid choice',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_refusals_are_one_line_with_the_alternative(refused, flags):
    assert REFUSED[flags] in refused(flags)


# On two ranks, with four layers.
LAYOUTS = {
    'x': "'x' is no layer",
    'E|t|t|t|tL': '5 stages, but a V on 2 pipeline ranks has 4; give 4 stages separated by |, such',
    'Ettt|tL': '2 stages, but',
    'Et|t|t|L': '3 layers t, but --num-layers 4; give 4 stages separated by |, such as Et|t|t|tL',
    'Et|t|t|t': 'the loss L stands once, at the end',
    't|t|t|tL': 'the embedding E stands once, at the beginning',
    'EEt|t|t|tL': 'the embedding E stands once',
    'Et|t|L|t': 'the loss L stands once',
    'Et|t|t|tmL': '1 prediction layers m, but --mtp-num-layers 0',
    'E(t|)*4L': '5 stages',
    'Et|t|t|t*2L': '5 layers t',
    'Et|t|t*99999999999999999999|L': 'longer than 100000',
    '(t*1000)*1000': 'longer than 100000',
    '|||': 'the embedding E stands once',
    '': '1 stages',
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_that_a_v_cannot_have(layout):
    with pytest.raises(ValueError) as caught:
        check_layout(layout, 2, 4, 0)
    text = str(caught.value)
    assert text.startswith(f'--pipeline-model-parallel-layout {layout}: ') and '\n' not in text
    assert LAYOUTS[layout] in text


def test_layouts_of_prediction_layers():
    for right in ('Et|t|t|tmL', 'Et|t|tt|mL', 'Et,t|t|tm|L', 'E(t|)*3tmL'):
        check_layout(right, 2, None, 1)
    for wrong, why in (('Etm|t|t|tL', 'second half'), ('Et|t|m|tL', 'after all layers t')):
        with pytest.raises(ValueError, match=why):
            check_layout(wrong, 2, None, 1)
    with pytest.raises(ValueError, match='belong to one stage'):
        check_layout('Et|tt|tm|mL', 2, 4, 2)


@pytest.mark.parametrize('layout', ['x', 'E|t|t|t|tL', 'Et|t|t|L', 'Ettt|tL'])
def test_a_layout_is_refused_with_the_arguments(refused, layout):
    flags = V.replace('-size 4', '-size 2', 1).replace('--num-layers 16', '--num-layers 4')
    assert layout in refused(f'{flags} --pipeline-model-parallel-layout {layout}')


@pytest.mark.parametrize('rank', ['0', '3'])
def test_one_rank_proves_the_whole_plan(parse, monkeypatch, rank):
    """The others start with what they can see, in a time that does not grow with the ranks."""
    asked = []
    monkeypatch.setenv('RANK', rank)
    monkeypatch.setattr(step_plan, 'prove', lambda *args, **kwargs: asked.append(args))
    parse(*V.split())
    assert bool(asked) == (rank == '0')


@pytest.mark.parametrize(
    'flags',
    [
        f'{MTP} {MHC} --save x',
        f'{MTP} --pipeline-schedule zb-v --load x',
        f'{MTP} --save x --ckpt-format torch',
        f'{MTP} --pipeline-model-parallel-layout {LAST}',
        f'{MTP} --save x {UNTIED}',
        f'{MTP} --save x --pipeline-model-parallel-layout Ett|tt|tt|tt|tt|m||L',
        f'{PP4} --mtp-num-layers 1 --pipeline-model-parallel-size 1 --save x',
        f'{MTP} {MHC} {UNTIED} --save x --pipeline-model-parallel-layout {ALONE}',
    ],
)
def test_copies_that_are_kept_equal_are_accepted(parse, flags):
    refusal.announce.cache_clear()
    parse(*flags.split())


def test_a_stock_run_is_told_of_copies_that_part(parse, capsys):
    refusal.announce.cache_clear()
    parse(*f'{MTP} {UNTIED} --pipeline-model-parallel-layout {ALONE}'.split())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'copies' in line]
    assert f'-layout {ALONE}: one pipeline rank holds two copies of the word embedding' in line


def test_a_script_that_names_other_ranks_than_those_with_a_copy_is_refused(parse):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    from megatron_mhc.pipeline.embedding_copies import check_embedding_group

    layout = PipelineParallelLayerLayout('Ett|tt|m|L', 2)
    check_embedding_group(layout, tied=False, rank=0, is_member=True)
    check_embedding_group(layout, tied=True, rank=1, is_member=True)
    # Megatron's default: the first and the last rank, whatever they hold.
    with pytest.raises(ValueError, match=r'ranks \[0\] hold .* rank 1 is in the embedding group'):
        check_embedding_group(layout, tied=False, rank=1, is_member=True)
    with pytest.raises(ValueError, match='rank 0 is not in the embedding group; the script must'):
        check_embedding_group(layout, tied=False, rank=0, is_member=False)


@pytest.mark.parametrize('overlap', [True, False])
def test_shapes_on_a_ring_of_two_need_overlap(parse, overlap):
    """Batched, the two messages to the one neighbour would be paired the wrong way round."""
    from megatron_mhc.patches.p2p import check_ring_of_two

    config = types.SimpleNamespace(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        mtp_num_layers=1,
        mtp_standalone=True,
        variable_seq_lengths=False,
        overlap_p2p_comm=overlap,
    )
    if overlap:
        check_ring_of_two(config)
    else:
        with pytest.raises(ValueError, match='leave p2p overlap on'):
            check_ring_of_two(config)


@pytest.mark.parametrize(
    ('flags', 'advised'),
    [
        (f'{V} {DIST} --save x', True),
        (f'{V} {DIST} --save x --dist-ckpt-optim-fully-reshardable', False),
        (f'{V} {DIST} --save x --no-save-optim', False),
        (f'{V} {DIST}', False),
        (f'{V} --save x', False),
        (f'{PP4} {DIST} --save x', False),
    ],
)
def test_state_that_only_the_same_layout_can_load_is_told_of(parse, capsys, flags, advised):
    refusal.announce.cache_clear()
    parse(*flags.split())
    assert ('add --dist-ckpt-optim-fully-reshardable' in capsys.readouterr().out) == advised


def test_hardware_queues_are_advised_on(parse, monkeypatch, capsys):
    for connections, advised in (('1', True), ('32', False)):
        refusal.announce.cache_clear()
        monkeypatch.setenv('CUDA_DEVICE_MAX_CONNECTIONS', connections)
        parse('--mhc-post-stream', 'high')
        out = capsys.readouterr().out
        assert ('CUDA_DEVICE_MAX_CONNECTIONS=1' in out) == advised
        assert ('behind other compute; set it to 8 or more' in out) == advised


@pytest.mark.parametrize(
    ('schedule', 'pattern', 'said'),
    [
        ('interleaved', '*-|*-', 'end as many stages with | in --hybrid-layer-pattern'),
        ('interleaved', '*-*-', 'end as many stages with | in --hybrid-layer-pattern'),
        ('1f1b', '*|-|*|-', 'or | of --hybrid-layer-pattern, or use --pipeline-schedule inter'),
        ('interleaved', '*|-|*|-', None),
        ('1f1b', '*-|*-', None),
    ],
)
def test_chunks_of_a_hybrid_pattern_are_its_parts(schedule, pattern, said):
    """Megatron has no flag of their number beside it."""
    for name in ('hybrid_layer_pattern', 'hybrid_override_pattern'):
        args = argparse.Namespace(
            pipeline_schedule=schedule,
            pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout=None,
            **{name: pattern},
        )
        if said is None:
            assert resolve_pipeline(args) is None
            continue
        with pytest.raises(ValueError, match=re.escape(said)):
            resolve_pipeline(args)


@pytest.mark.parametrize('flag', ['--tensor-model-parallel-size', '--context-parallel-size'])
def test_no_advice_that_megatron_refuses(monkeypatch, capsys, flag):
    """Before Blackwell it ends a run with more queues."""
    refusal.announce.cache_clear()
    monkeypatch.setenv('CUDA_DEVICE_MAX_CONNECTIONS', '1')
    name = flag.removeprefix('--').replace('-', '_')
    resolve_pipeline(argparse.Namespace(mhc_post_stream='high', **{name: 2}))
    out = capsys.readouterr().out
    assert f'Megatron demands 1 for {flag}, so use 1 there' in out
    assert 'from Blackwell on set it to 8 or more' in out


@pytest.mark.parametrize('ranks', [1, 2, 3, 8])
def test_inverted_v(ranks):
    stages = [stage_of(rank, chunk, ranks) for rank in range(ranks) for chunk in (0, 1)]
    assert sorted(stages) == list(range(2 * ranks))
    assert all(
        holder_of(stage_of(r, c, ranks), ranks) == (r, c) for r in range(ranks) for c in (0, 1)
    )
    assert holder_of(0, ranks) == (ranks - 1, 0) and holder_of(2 * ranks - 1, ranks) == (
        ranks - 1,
        1,
    )


def test_the_end_rank_is_the_lightest():
    for layers in range(16, 33):
        counts = balanced(layers, 8)
        assert sum(counts) == layers and max(counts) - min(counts) <= 1
        held = [counts[stage_of(rank, 0, 8)] + counts[stage_of(rank, 1, 8)] for rank in range(8)]
        assert held[-1] == min(held)


def test_prediction_layers_stand_before_the_loss():
    assert even_layout(4, 2, 'E', 'mL') == 'Et|t|t|tmL'


@pytest.mark.parametrize(
    ('line', 'wanted'),
    [
        ('x.py --pipeline-schedule dualpipev', True),
        ('x.py --pipeline-schedule=zb-v --bf16', True),
        ('x.py --pipeline-schedule 1f1b', False),
        ('x.py --bf16', False),
    ],
)
def test_a_v_is_seen_on_the_command_line(line, wanted):
    assert asks_for_a_v(line.split()) == wanted
