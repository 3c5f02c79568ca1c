"""Hybrid models in a study: stages of a pattern, costs of its layers, what does not exist."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shlex

import pytest

from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.schedules.stage_layers import stage_at
from megatron_mhc.settings.names import V_SCHEDULES
from megatron_mhc.sizing.divides import model_checks
from megatron_mhc.sizing.flops import head_flops, layer_flops, step_flops, token_flops
from megatron_mhc.sizing.memory import Layout, edge_bytes, rank_memory, stages_of
from megatron_mhc.sizing.mixers import DeltaNet, Mamba
from megatron_mhc.sizing.shape import Experts, GroupedAttention, ModelShape
from megatron_mhc.sizing.stages import even_parts, pieces, stage_counts, staged_pattern
from megatron_mhc.study.costs import CostModel
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.presets import PRESETS

H100 = PRESETS['h100']
RECIPE = RECIPES['nemotron-h-8b']
SHAPE = RECIPE.shape()


@pytest.fixture
def command(answer):
    return lambda words: answer(f'study {words}')


def cut(pattern: str, shape: ModelShape = SHAPE) -> ModelShape:
    layers = len(pattern.replace('|', ''))
    return dataclasses.replace(shape, pattern=pattern, layers=layers)


def test_stages_are_as_even_as_any(random_seed):
    """Against all ways to cut a short row of works, the output layer with the last stage."""
    draw = random.Random(random_seed)
    for _ in range(20):
        works = tuple(draw.randrange(1, 50) for _ in range(draw.randrange(4, 10)))
        stages, last = draw.randrange(1, 5), draw.choice((0, 30))
        ways = []
        for ends in itertools.combinations(range(1, len(works)), stages - 1):
            edges = [0, *ends, len(works)]
            sums = [sum(works[a:b]) for a, b in itertools.pairwise(edges)]
            ways.append(max(*sums[:-1], sums[-1] + last, 0))
        counts = even_parts(works, stages, last)
        assert len(counts) == stages and min(counts) >= 1 and sum(counts) == len(works)
        starts = [sum(counts[:i]) for i in range(stages + 1)]
        sums = [sum(works[a:b]) for a, b in itertools.pairwise(starts)]
        assert max(*sums[:-1], sums[-1] + last, 0) == min(ways)


def test_stages_end_where_the_pattern_lets_them():
    free = cut('M-M-*-M-')
    assert sum(stage_counts(free, 2, 'line', 1)) == 8
    # Anywhere without a pipe, at each where there are as many, at some where there are more.
    for pattern, pp, chunks, parts in (
        ('M-|M-*-M-', 2, 1, ['M-', 'M-*-M-']),
        ('M-|M-|*-|M-', 2, 2, ['M-', 'M-', '*-', 'M-']),
        ('MMMMMMM|-|-|-', 2, 1, ['MMMMMMM-', '--']),
    ):
        shape = cut(pattern)
        counts = stage_counts(shape, pp, 'interleaved', chunks)
        assert staged_pattern(shape, counts).split('|') == parts
    with pytest.raises(ValueError, match=r'M\|-: 2 parts on 4 stages; use at most 2 pipeline'):
        stage_counts(cut('M|-'), 4, 'line', 1)
    assert staged_pattern(cut('M-|M-'), [4]) == 'M-M-' and pieces('M|-*') == ['M', '-*']


def test_the_last_stage_of_a_hybrid_model_has_room_for_the_output_layer():
    """That of 8B is as much as three MLPs."""
    assert head_flops(SHAPE) > 3 * layer_flops(SHAPE, '-').total()
    counts = stage_counts(SHAPE, 4, 'line', 1)
    assert sum(counts) == 52 and counts[-1] < min(counts[:-1])


@pytest.mark.parametrize('pattern', ['*-*-*-', '*E*E*E', '*-*E*-'])
def test_a_pattern_of_attention_and_mlps_is_sized_up_as_its_gpt(pattern):
    """Twice as many layers of one sublayer each, and the same memory, seconds and bytes."""
    sparse = tuple(symbol == 'E' for symbol in pattern)
    experts = Experts(8, 2, 96, 32, sparse[1::2]) if 'E' in pattern else None
    attention = GroupedAttention(4, 2, 16)
    gpt = ModelShape(3, 64, 128, 256, 128, attention, experts, residual=SHAPE.residual)
    own = experts and dataclasses.replace(experts, layers=sparse)
    hybrid = dataclasses.replace(cut(pattern, gpt), experts=own)
    assert token_flops(hybrid) == token_flops(gpt) and hybrid.sublayers == gpt.sublayers == 6
    layout = Layout(8, tp=2, ep=2 if experts else 1)
    assert rank_memory(hybrid, layout, 8) == rank_memory(gpt, layout, 8)
    (ours,), (wanted,) = (
        CostModel(one, H100, BytesModel(H100)).stages(layout) for one in (hybrid, gpt)
    )
    assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(wanted))


def test_compute_is_the_models_flops():
    """Forward and backward are 3 forwards, but for the backward of what mixes the sequence."""
    fast = dataclasses.replace(
        H100, gemm_efficiency=1.0, attention_efficiency=1.0, memory_gb_s=1e30
    )
    delta = DeltaNet(4, 32, 8, 32, 4)
    shape = dataclasses.replace(cut('MG*-' * 4, RECIPE.shape('standard')), delta_net=delta)
    layout = Layout(2, pp=2, schedule='interleaved')
    stages = CostModel(shape, fast, BytesModel(fast)).stages(layout)
    found = sum(stage.forward + stage.input_grad + stage.weight_grad for stage in stages)
    flops = token_flops(shape)
    cores = sum(flops[name] for name in ('attention_core', 'mamba_scan', 'delta_rule'))
    # 2.5 forwards instead of 2.
    expected = step_flops(shape, 1) + 0.5 * cores * shape.sequence
    assert found * 989e12 == pytest.approx(expected, rel=1e-9)


def test_what_a_scan_keeps_and_moves():
    """Mamba of 8 heads x 64, two groups of state 16: D 512, x B C 576, z x B C dt 1096."""
    mamba = Mamba(heads=8, head_dim=64, groups=2, state=16)
    # A chunk of 128 tokens has 8 states of 64 x 16 in fp32: 2 x 64 values of bf16 a token.
    assert mamba.kept(2) == 1096 + 576 + 2 * 512 + 128
    # The convolution, the scan with a state written and read, the gated norm.
    assert mamba.moved(2) == 2 * 576 + (576 + 8 + 512 + 2 * 128) + 3 * 512
    delta = DeltaNet(key_heads=2, key_dim=32, value_heads=4, value_dim=64, convolution=4)
    assert delta.kept(2) == (128 + 2 * 256 + 8) + 384 + 2 * 256 + 128
    assert delta.moved(2) == 2 * 384 + (384 + 8 + 256 + 2 * 128) + 3 * 256


def test_a_slow_memory_makes_the_scan_slow_and_nothing_else_of_an_mlp():
    slow = dataclasses.replace(H100, memory_gb_s=H100.memory_gb_s / 2)
    shape = RECIPE.shape('standard')

    def core(hardware, symbol):
        return CostModel(shape, hardware, BytesModel(hardware))._core(symbol)

    assert core(slow, 'M') == pytest.approx(2 * core(H100, 'M')) and core(slow, '-') == 0
    assert core(slow, '*') == core(H100, '*') > 0


def test_streams_of_one_sublayer_a_layer():
    """An edge is n C wide, and n = 4 costs as many kernels as there are layers."""
    layout = Layout(8, pp=2, tp=2, schedule='1f1b')
    assert edge_bytes(SHAPE, layout) == 2 * 8192 // 2 * 4 * 4096
    wide, plain = (
        CostModel(RECIPE.shape(kind), H100, BytesModel(H100)).stages(Layout(1))[0]
        for kind in ('mhc', 'standard')
    )
    bytes_model = BytesModel(H100)
    one, none = (
        bytes_model.sublayer(RECIPE.shape(kind).residual, 4096, 8192)
        for kind in ('mhc', 'standard')
    )
    assert wide.forward - plain.forward == pytest.approx(52 * (one.forward - none.forward))


def test_a_study_of_a_published_model(command, tmp_path):
    line = 'nemotron-h-8b --gpus 16 32 --tp 2 --pp 1 2 4 --num-residual-streams 2 4'
    status, out, error = command(f'{line} --output {tmp_path} --launch-scripts {tmp_path} --json')
    found = json.loads(out)
    assert status == 0 and not error and len(found['best']) == 2
    for name in ('study.png', 'scaling.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
    schedules = {point['schedule'] for point in found['points']}
    assert schedules >= {'-', '1f1b', 'interleaved'}
    assert schedules & {*V_SCHEDULES}
    script = (tmp_path / 'gpus-32-n4.sh').read_text()
    assert '"${PRETRAIN:-pretrain_hybrid.py}"' in script and '--squared-relu' in script


@pytest.mark.parametrize(('schedule', 'pipes'), [('1f1b', 3), ('interleaved', 7)])
def test_the_flags_cut_the_pattern_as_the_memory_was_estimated(command, schedule, pipes):
    line = f'nemotron-h-8b --gpus 32 --tp 2 --pp 4 --schedule {schedule} --json'
    (best,) = json.loads(command(line)[1])['best']
    words = shlex.split(best['flags'].replace('\\\n', ' '))
    pattern = words[words.index('--hybrid-layer-pattern') + 1]
    assert pattern.count('|') == pipes and pattern.replace('|', '') == RECIPE.pattern
    layout = Layout(32, pp=4, tp=2, schedule=schedule)
    held = stages_of(SHAPE, 4, layout.placement, layout.chunks)
    for rank, stages in enumerate(held):
        for chunk, layers in enumerate(stages):
            part = pattern.split('|')[stage_at(rank, chunk, 4, layout.placement)]
            assert len(part) == len(layers)
    assert '--pipeline-model-parallel-layout' not in words
    assert '--num-virtual-stages-per-pipeline-rank' not in words
    assert '--mhc-post-stream' not in words


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('--cp 2', 'context parallelism of Mamba layers is not modelled; choose --cp 1'),
        ('--pp 64', 'fewer layers than stages; choose --pp, and --vpp, with at most 52 stages'),
        ('--tp 16', 'do not divide by tp; choose a --tp that divides 8'),
    ],
)
def test_layouts_that_do_not_exist(command, line, said):
    status, out, error = command(f'nemotron-h-8b --gpus 64 {line}')
    assert status == 2 and not out and error.count('\n') == 1 and said in error


@pytest.mark.parametrize(
    ('shape', 'said'),
    [
        (
            dataclasses.replace(SHAPE, mamba=Mamba(128, 64, 2, 128)),
            'heads of Mamba layers',
        ),
        (
            dataclasses.replace(SHAPE, delta_net=DeltaNet(2, 64, 4, 64, 4)),
            'the heads of gated delta net layers, or their groups, do not divide by tp',
        ),
        (cut('M-M-|M-'), 'fewer parts than stages'),
    ],
)
def test_what_a_hybrid_model_does_not_divide(shape, said):
    refused = [words for wrong, words, _ in model_checks(shape, 4, 1, 1, 3) if wrong]
    assert len(refused) == 1 and said in refused[0]
