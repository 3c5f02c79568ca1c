"""Context parallelism, fp8, full recomputation and hyper-connections as a study models them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.sizing.memory import Layout, rank_memory
from megatron_mhc.study.costs import CostModel
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.links import Group, groups_of
from megatron_mhc.study.presets import PRESETS
from megatron_mhc.study.ring import kv_width, ring_of

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
