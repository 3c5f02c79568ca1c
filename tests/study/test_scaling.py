"""Scaling curves: efficiency, knees, days and costs; in the terminal, in JSON, CSV and pictures."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest

from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.study.budget import Budget
from megatron_mhc.study.estimate import run_study
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.names import token_count
from megatron_mhc.study.presets import PRESETS
from megatron_mhc.study.scaling import BEST, curves
from megatron_mhc.study.sweep import Sweep

H100 = PRESETS['h100']
SWEEP = Sweep((64, 128, 256), (1,), (2, 4), (8,), schedule=('1f1b', 'zb-v'), streams=(2, 4))


@pytest.fixture
def command(answer):
    return lambda words: answer(f'study {words}')


def points_of(grows):
    sweep = dataclasses.replace(SWEEP, grows=grows)
    return run_study(RECIPES['27b'].shape(), 1280, sweep, H100, BytesModel(H100)).points


def test_a_batch_grows_with_the_gpus_or_stays():
    strong, weak = points_of(False), points_of(True)
    assert {point.global_batch for point in strong} == {1280}
    assert {(p.layout.gpus, p.global_batch) for p in weak} == {(64, 1280), (128, 2560), (256, 5120)}
    # A rank has as many microbatches then, so that only messages make a step longer.
    assert len({p.microbatches for p in weak if p.layout.pp == 4}) == 1
    assert len({p.microbatches for p in strong if p.layout.pp == 4}) == 3


@pytest.mark.parametrize('grows', [False, True])
def test_curves_are_the_fastest_layouts_and_efficiency_is_speed_by_gpu(grows):
    points = points_of(grows)
    found = curves(points, 'weak' if grows else 'strong')
    names = [(curve.streams, curve.schedule) for curve in found]
    assert names == [(n, name) for n in (2, 4) for name in (BEST, '1f1b', 'zb-v')]
    for curve in found:
        assert [point.layout.gpus for point in curve.points] == [64, 128, 256]
        for point in curve.points:
            same = [
                p
                for p in points
                if p.fits and p.streams == curve.streams and p.layout.gpus == point.layout.gpus
            ]
            if curve.schedule != BEST:
                same = [p for p in same if p.schedule_name == curve.schedule]
            assert point.step_s == min(p.step_s for p in same)
            first, ratio = curve.points[0], point.layout.gpus / 64
            # Strong: time on one count by (ratio x time); weak: time by time.
            steps = first.step_s / point.step_s / (1 if grows else ratio)
            assert curve.efficiency(point) == pytest.approx(steps)
    # What fills the pipeline grows along, so that weak scaling loses less.
    best = found[0]
    assert best.efficiency(best.points[-1]) > (0.9 if grows else 0)


def test_the_knee_names_what_takes_over():
    """A slow network by communication; a short batch by the bubble; at a fast one nothing."""

    def knee(network, grows, pp):
        hardware = dataclasses.replace(H100, network_gb_s=network, latency_us=0)
        sweep = Sweep((64, 512), (1,), (pp,), (8,), schedule=('1f1b',), grows=grows)
        shape = RECIPES['27b'].shape()
        points = run_study(shape, 1280, sweep, hardware, BytesModel(hardware)).points
        return curves(points, 'strong')[0].knee

    short = knee(400, False, 4)
    assert (short.cause, short.network, short.point.layout.gpus) == ('bubble', False, 512)
    assert short.efficiency < 0.9 and 0.5 < short.share <= 1
    slow = knee(2, False, 2)
    assert slow.cause == 'communication' and slow.network
    assert knee(400, True, 2) is None


def test_days_hours_and_cost_are_tokens_by_speed():
    point = points_of(False)[0]
    found = Budget(2e12, 3.0).of(point)
    hours = 2e12 / point.tokens_per_gpu_s / 3600
    assert found == pytest.approx(
        {'days': hours / point.layout.gpus / 24, 'gpu_hours': hours, 'cost': 3 * hours}
    )
    assert 'cost' not in Budget(2e12).of(point)


@pytest.mark.parametrize(
    'text, tokens', [('1T', 1e12), ('300B', 3e11), ('1.5t', 1.5e12), ('2e11', 2e11), ('7', 7)]
)
def test_tokens_are_written_as_people_do(text, tokens):
    assert token_count(text) == tokens


LINE = '27b --gpus 64 128 256 --tp 1 --pp 2 4 --ep 8 --schedule 1f1b zb-v'


def test_curves_are_printed(command):
    status, out, error = command(f'{LINE} --train-tokens 1T --gpu-hour-price 2')
    assert (status, error) == (0, '')
    assert 'strong scaling, the same batch' in out and 'weak scaling, a batch that grows' in out
    assert out.count('knee: ') == 2
    assert 'GPU-hours' in out and 'cost' in out and '1,000 billion tokens' in out
    assert '-0.0%' not in out
    alone = command(f'{LINE} --scaling weak')[1]
    assert 'strong scaling' not in alone and 'weak scaling' in alone and 'cost' not in alone


def test_one_number_of_gpus_is_no_curve(command):
    assert 'scaling' not in command('27b --gpus 64 --pp 4 --schedule 1f1b')[1]


def test_counts_without_a_layout_have_a_dash(command):
    out = command('27b --gpus 64 100 --tp 1 --pp 4 --ep 8 --schedule 1f1b 1f1b')[1]
    assert 'scaling' not in out
    out = command('27b --gpus 64 100 128 --tp 1 --pp 4 --ep 8 --schedule 1f1b --scaling strong')[1]
    (row,) = [line for line in out.splitlines() if line.split()[:2] == ['100', '-']][:1]
    assert set(row.split()[1:]) == {'-'}
    assert '-: no layout exists, or none fits; --gpus 100 alone says why' in out


def test_curves_in_json_csv_and_a_picture(command, tmp_path):
    out = command(f'{LINE} --json --gpu-hour-price 2 --output {tmp_path}')[1]
    rows = json.loads(out)['scaling']
    assert {row['scaling'] for row in rows} == {'strong', 'weak'}
    assert {row['curve'] for row in rows} == {'best', '1f1b', 'zb-v'}
    assert all(row['days'] > 0 and row['cost'] == 2 * row['gpu_hours'] for row in rows)
    assert all(row['efficiency'] == 1 for row in rows if row['gpus'] == 64)
    with (tmp_path / 'scaling.csv').open(newline='') as file:
        written = list(csv.DictReader(file))
    assert [row['gpus'] for row in written] == [str(row['gpus']) for row in rows]
    assert float(written[-1]['efficiency']) == rows[-1]['efficiency']
    assert (tmp_path / 'scaling.png').read_bytes().startswith(b'\x89PNG')


def test_the_picture_has_a_cloud_and_a_front_for_each_number_of_gpus():
    from matplotlib.figure import Figure

    from megatron_mhc.study.picture import scatter

    study = run_study(RECIPES['27b'].shape(), 1280, SWEEP, H100, BytesModel(H100))
    axes = Figure().subplots()
    scatter(axes, study, [64, 128, 256])
    labels = [cloud.get_label() for cloud in axes.collections]
    assert labels == [f'{mark}{g} GPUs' for mark in ('', '_') for g in (64, 128, 256)]
    clouds = [tuple(cloud.get_facecolor()[0][:3]) for cloud in axes.collections[:3]]
    keys = [line for line in axes.lines if not line.get_label().startswith('_')]
    assert [line.get_label() for line in keys] == ['n = 2', 'n = 4']
    fronts = [line for line in axes.lines if line not in keys]
    assert len(set(clouds)) == 3 and len(fronts) == 6
    fitting = {(p.memory_gib, p.step_s) for p in study.points if p.fits}
    assert all({*zip(*line.get_data(), strict=True)} <= fitting for line in fronts)
    assert 'GiB' in axes.get_xlabel() and axes.get_ylabel() == 'step time, s'
