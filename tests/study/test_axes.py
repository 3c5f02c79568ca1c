"""Context parallelism, fp8, full recomputation and hyper-connections as a study models them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_mhc import ResidualConfig
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.sizing.flops import layer_flops
from megatron_mhc.sizing.memory import Layout, rank_memory
from megatron_mhc.sizing.size import parameters
from megatron_mhc.study.costs import CostModel
from megatron_mhc.study.estimate import run_study
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.links import Group, groups_of
from megatron_mhc.study.presets import PRESETS
from megatron_mhc.study.ring import kv_width, ring_of
from megatron_mhc.study.sweep import Sweep

H100 = PRESETS['h100']
SHAPE = RECIPES['27b'].shape()


@pytest.fixture
def command(answer):
    return lambda words: answer(f'study {words}')


def test_context_parallel_ranks_share_the_tokens_of_a_sequence():
    """Half the activations and logits; states stay, as ranks of a sequence are replicas too."""
    one, two = (rank_memory(SHAPE, Layout(64, pp=4, ep=8, cp=cp), 1280)[3] for cp in (1, 2))
    assert (two.weights, two.states) == (one.weights, one.states)
    assert two.kept_recompute * 2 == one.kept_recompute and two.logits * 2 == one.logits
    assert (Layout(64, pp=4, cp=2).dp, Layout(64, pp=4, cp=2).replicas) == (8, 16)
    with pytest.raises(ValueError, match='no multiple of tp x cp x pp = 12'):
        Layout(64, pp=4, cp=3)
    groups = groups_of(Layout(64, tp=2, cp=2, pp=4, ep=4), H100)
    sizes = {'tp': (2, 1), 'cp': (2, 2), 'ep': (4, 2), 'dp': (8, 2), 'expert_dp': (2, 8)}
    for name, (members, stride) in (sizes | {'pp': (4, 16)}).items():
        group = getattr(groups, name)
        assert (name, group.members, group.stride) == (name, members, stride)


def test_a_ring_is_exposed_by_what_attention_does_not_cover():
    """MLA of 27B: 32 heads of (128 + 64) + 128 values; 1024 tokens a rank at cp 4."""
    assert kv_width(SHAPE) == 32 * 320
    layout, ideal = Layout(4, cp=4), dataclasses.replace(H100, latency_us=0, link_efficiency=1.0)
    size = 2 * 1024 * 32 * 320
    group, seconds = Group(ideal, 4, 1), size / 450e9
    ring = ring_of(SHAPE, layout, group, 1024, (0.0, 0.0))
    assert ring == pytest.approx((3 * seconds, 6 * seconds, 9 * size))
    covered = ring_of(SHAPE, layout, group, 1024, (2 * seconds, 9 * seconds))
    assert covered[:2] == pytest.approx((1.5 * seconds, 0))
    assert ring_of(SHAPE, Layout(4), Group(ideal, 1, 1), 4096, (0.0, 0.0)) == (0, 0, 0)


def test_context_parallelism_halves_the_compute_of_a_microbatch():
    model = CostModel(SHAPE, dataclasses.replace(H100, latency_us=0), BytesModel(H100))
    one, two = (model.stages(Layout(64, pp=4, ep=8, cp=cp))[0] for cp in (1, 2))
    assert one.forward / 2 <= two.forward <= one.forward / 2 + two.ring
    assert two.weight_grad == pytest.approx(one.weight_grad / 2)
    assert one.ring_bytes == 0 and two.ring_bytes > 0


def test_context_parallelism_is_an_axis(command):
    line = '27b --gpus 64 --tp 1 --cp 1 2 --pp 4 --ep 8 --schedule 1f1b --json'
    found = json.loads(command(line)[1])['points']
    ranks = [(row['cp'], row['dp'], row['microbatches']) for row in found]
    assert ranks == [(1, 16, 80), (2, 8, 160)]
    one, two = found
    assert two['one_queue'] and not one['one_queue']
    assert two['memory_gib'] < one['memory_gib'] and two['cp_bytes'] > one['cp_bytes'] == 0
    (best,) = json.loads(command(line.replace('--cp 1 2', '--cp 2'))[1])['best']
    assert '--context-parallel-size 2' in best['flags']
    assert best['environment'] == {'CUDA_DEVICE_MAX_CONNECTIONS': '1'}
    status, _, error = command('27b --gpus 63 --tp 1 --pp 3 --cp 3 --ep 1')
    assert status == 2 and 'the sequence does not divide by 2 x cp x tp' in error


def estimate(batch=256, hardware=H100, shape=SHAPE, **sizes):
    one = {'gpus': (64,), 'tp': (1,), 'pp': (4,), 'ep': (8,), 'schedule': ('1f1b',)}
    return run_study(shape, batch, Sweep(**one | sizes), hardware, BytesModel(hardware)).points


def test_fp8_speeds_up_the_products_alone():
    """At 55 % of peak a FLOP takes 1 / 0.55 in bf16, and half of one less in fp8."""
    wide, narrow = (
        CostModel(dataclasses.replace(SHAPE, fp8=fp8), H100, BytesModel(H100))
        for fp8 in (False, True)
    )
    flops = layer_flops(SHAPE, '+-')
    products = flops['attention_projections'] + flops['dense_mlp']
    layout = Layout(64, pp=4, ep=8)
    saved = 4096 * products * (1 / 989e12 - 1 / 1979e12)
    one, other = (model._layer(layout, '+-') for model in (wide, narrow))
    for name in ('forward', 'input_grad', 'weight_grad'):
        assert getattr(one, name) - getattr(other, name) == pytest.approx(saved)
    assert one.weight_grad == pytest.approx(4096 * products / 989e12 / 0.55)
    bf16, fp8 = estimate(precision=('bf16', 'fp8'))
    assert (bf16.precision, fp8.precision) == ('bf16', 'fp8')
    assert fp8.step_s < bf16.step_s
    # Weights once more, and their transposes: a byte each of what is linear.
    assert 0 < (fp8.memory_gib - bf16.memory_gib) * 2**30 < 2 * parameters(SHAPE).total() / 8


def test_full_recomputation_runs_the_forward_again():
    points = estimate(recompute=('none', 'full'), ep=(1, 8))
    none, full = points[:2], points[2:]
    assert [point.recompute for point in none + full] == ['none'] * 2 + ['full'] * 2
    for a, b in zip(none, full, strict=True):
        # Of F, I and W a third comes on top, head and loss aside.
        assert 1.2 * a.step_s < b.step_s < 1.4 * a.step_s
        assert b.memory_gib < 0.7 * a.memory_gib
        assert b.ep_bytes == pytest.approx(1.5 * a.ep_bytes)
    assert full[1].exposed_ep_s == pytest.approx(1.5 * none[1].exposed_ep_s, rel=0.05)
    model = CostModel(dataclasses.replace(SHAPE, full_recompute=True), H100, BytesModel(H100))
    stage, stock = (
        one.stages(Layout(64, pp=4, ep=8, schedule='1f1b'))[0]
        for one in (model, CostModel(SHAPE, H100, BytesModel(H100)))
    )
    residual = dataclasses.replace(SHAPE.residual, recompute_layer_num='none')
    assert SHAPE.residual == residual and stage.forward == stock.forward
    assert stage.input_grad == pytest.approx(stock.input_grad + stock.forward)


def test_full_recomputation_keeps_the_input_of_a_layer():
    shape = dataclasses.replace(SHAPE, full_recompute=True)
    rank = rank_memory(shape, Layout(1), 1280)[0]
    assert rank.kept == rank.kept_recompute == 30 * 4 * 2560 * 2 * 4096
    assert rank.rebuilt > 0 and rank.total_recompute == rank.total + rank.rebuilt


def test_full_recomputation_has_no_v(command):
    line = '27b --gpus 64 --tp 1 --pp 4 --ep 8 --recompute full'
    status, out, _ = command(line)
    assert status == 0 and 'is not modelled where a plan splits the backward' in out
    assert '--recompute-granularity full --recompute-method uniform' in out
    assert '--mhc-post-stream' not in out and '--mhc-recompute-layer-num' not in out
    found = json.loads(command(f'{line} --residual-type standard --json')[1])
    assert {row['schedule'] for row in found['points']} == {'1f1b', 'interleaved'}


def test_fp8_has_its_flags(command):
    line = '27b --gpus 64 --tp 1 --pp 4 --ep 8 --schedule zb-v --precision'
    assert '--fp8-format hybrid --fp8-recipe tensorwise' in command(f'{line} fp8')[1]
    assert '--fp8-format' not in command(f'{line} bf16')[1]


def test_hyper_connections_move_more_than_a_plain_residual(command):
    """n = 4, C values a token: maps 4 n read; F_pre n + 1; F_post,res 2 n + 1: 18 of them."""
    kernels = BytesModel(dataclasses.replace(H100, kernel_efficiency=1.0))
    hc, plain = (kernels.sublayer(ResidualConfig(kind), 2560, 4096) for kind in ('hc', 'standard'))
    values = 4 + (4 + 1) + (4 + 1 + 4)
    maps = 24 + 4 + 4 + 16
    assert hc.forward == pytest.approx(4096 * (2 * 2560 * values + 4 * maps) / 3350e9)
    assert hc.backward > 2 * hc.forward > plain.forward
    line = '27b --gpus 64 --tp 1 --pp 4 --ep 8 --schedule 1f1b --json --residual-type'
    (best,) = json.loads(command(f'{line} hc')[1])['best']
    assert '--residual-type hc --mhc-num-residual-streams 4' in best['flags']
    assert best['mhc_overhead'] > 0 and '--mhc-sinkhorn' not in best['flags']
