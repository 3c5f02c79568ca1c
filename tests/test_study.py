"""The scaling study: one formula with schedules and memory, sane rankings, speed, its command."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mhc import ResidualConfig
from megatron_mhc.block_cost import block_size
from megatron_mhc.cli import main
from megatron_mhc.model_flops import step_flops
from megatron_mhc.model_memory import Layout, edge_bytes, rank_memory
from megatron_mhc.recipe import RECIPES
from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.lowering import place_recompute
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.times import Times
from megatron_mhc.study_calibrate import calibration
from megatron_mhc.study_costs import CostModel, Costs
from megatron_mhc.study_hardware import PRESETS, hardware_of
from megatron_mhc.study_kernels import BytesModel, Measured
from megatron_mhc.study_output import breakdown
from megatron_mhc.study_pipeline import EXACT, Case, run_steps
from megatron_mhc.study_points import best_of, pareto, run_study
from megatron_mhc.study_sweep import Sweep, legal_layouts

H100 = PRESETS['h100']
SCHEDULES = ('1f1b', 'interleaved', 'zb-v', 'dualpipev', 'dualpipev-w')


def costs_of(times: Times, stages: int, chunks: int) -> list[Costs]:
    """The same times as ``Times`` gives each stage."""
    scale = [one / chunks for one in times.stage_scale or (1.0,) * stages]
    return [
        Costs(times.forward * s, times.input_grad * s, times.weight_grad * s, times.recompute * s)
        for s in scale
    ]


def study_of(name='27b', batch=256, hardware=H100, residual='mhc', **sizes):
    sweep = Sweep(**{'gpus': (64,), 'tp': (1,), 'pp': (4,), 'ep': (8,)} | sizes)
    shape = RECIPES[name].shape(residual)
    return run_study(shape, batch, sweep, hardware, BytesModel(hardware))


@pytest.fixture
def command(capsys):
    """``command(words)``: exit status, stdout and stderr of ``megatron-mhc study words``."""

    def run(line: str):
        with pytest.raises(SystemExit) as ended:
            main(['study', *line.split()])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_steps_and_bubbles_are_those_of_the_simulator(schedule, random_seed):
    """All-to-all aside, which the simulator does not know."""
    draw = random.Random(random_seed)
    cases, expected = [], []
    for pp in (2, 4, 4, 8):
        layout = Layout(pp, pp=pp, schedule=schedule, vpp=draw.choice((2, 3)))
        m = pp * draw.choice((2, 3, EXACT))
        rebuilt = layout.placement == 'v' and draw.random() < 0.7
        names = ('forward', 'input_grad', 'weight_grad', 'hop')
        times = Times(
            **{name: draw.uniform(0.2, 2) for name in names},
            recompute=draw.uniform(0.1, 1) * rebuilt,
            stage_scale=tuple(draw.uniform(0.5, 2) for _ in range(layout.stages)),
        )
        stages = costs_of(times, layout.stages, layout.chunks)
        cases.append(Case(layout, m, stages, times.hop))
        plan = make_plan(schedule, pp, m, chunks=layout.vpp)
        expected.append(simulate(place_recompute(plan) if rebuilt else plan, times))
    for step, timeline in zip(run_steps(cases), expected, strict=True):
        assert step.makespan == pytest.approx(timeline.makespan)
        assert step.work == pytest.approx(timeline.work)
        assert step.bubble_share == pytest.approx(timeline.bubble_share)
        assert 0 <= step.hops < step.makespan and step.exchange == 0


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_long_steps_grow_as_the_simulated_ones(schedule, random_seed):
    """Exactly where stages are alike; 2 % is the most that uneven ones may be off."""
    draw = random.Random(random_seed)
    for uneven, tolerance in ((False, 1e-9), (True, 0.02)):
        layout = Layout(4, pp=4, schedule=schedule)
        scale = [draw.uniform(0.9, 1.2) if uneven else 1.0 for _ in range(layout.stages)]
        times = Times(
            input_grad=draw.uniform(1, 1.5),
            weight_grad=draw.uniform(0.7, 1),
            hop=draw.uniform(0, 0.3),
            stage_scale=tuple(scale),
        )
        m = 4 * (EXACT + 9) + (draw.randrange(4) if schedule != 'interleaved' else 0)
        case = Case(layout, m, costs_of(times, layout.stages, layout.chunks), times.hop)
        found = simulate(make_plan(schedule, 4, m), times).makespan
        assert run_steps([case])[0].makespan == pytest.approx(found, rel=tolerance)


def test_a_fused_slot_hides_the_all_to_all():
    def step(schedule, overlap):
        layout = Layout(4, pp=4, schedule=schedule)
        stages = [Costs(1, 1, 1, exchange=0.3) for _ in range(layout.stages)]
        return run_steps([Case(layout, 32, stages, 0.0, overlap)])[0]

    hidden, open_ = step('dualpipev', 1.0), step('dualpipev', 0.0)
    assert hidden.exchange < 0.5 * open_.exchange
    # 32 microbatches through two chunks, forward and backward.
    assert open_.exchange >= 32 * 2 * 2 * 0.3
    assert step('zb-v', 1.0) == step('zb-v', 0.0)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('blocks', ['none', 'auto', 3])
def test_memory_and_messages_are_those_of_model_memory(schedule, blocks):
    points = study_of(schedule=(schedule,), recompute=(blocks,)).points
    assert len(points) == 1
    point, layout = points[0], Layout(64, pp=4, ep=8, schedule=schedule)
    residual = ResidualConfig('mhc', recompute_layer_num=blocks)
    shape = dataclasses.replace(RECIPES['27b'].shape(), residual=residual)
    ranks = rank_memory(shape, layout, 256)
    kept = 'total' if blocks == 'none' else 'total_recompute'
    assert point.memory_gib == max(getattr(rank, kept) for rank in ranks) / 2**30
    # A rank within the pipe sends an activation and a gradient for each of its chunks.
    assert point.pp_bytes == point.microbatches * 2 * layout.chunks * edge_bytes(shape, layout)
    flops = step_flops(shape, 256)
    assert point.mfu == pytest.approx(flops / (64 * 989e12 * point.step_s))


def test_memory_counts_the_blocks_that_are_asked_for():
    """27B on one rank: L = 60 sublayers; 10 blocks of 6 keep less than 20 of 3."""
    kept = {}
    for size in (3, 6, 'auto', 'stage'):
        residual = ResidualConfig('mhc', recompute_layer_num=size)
        shape = dataclasses.replace(RECIPES['27b'].shape(), residual=residual)
        rank = rank_memory(shape, Layout(1), 1280)[0]
        kept[size] = rank.kept_recompute, rank.rebuilt
    token = 2 * 4096 * 2560
    assert kept[3][0] - kept[6][0] == (20 - 10) * 4 * token
    assert kept[6] == kept['auto'] and kept['stage'][1] == 60 * 6 * token


def test_stock_schedules_hold_the_ends_apart():
    shape = RECIPES['27b'].shape()
    for layout in (Layout(64, pp=4, ep=8, schedule='1f1b'), Layout(4, pp=4, schedule='zb-v')):
        ranks = rank_memory(shape, layout, 1280)
        line = layout.schedule == '1f1b'
        assert (ranks[0].live, ranks[3].live) == ((4, 1) if line else (4, 4))
        # Rank 0 of a line has the embedding, that of an inverted V has only layers.
        assert (ranks[0].weights > ranks[1].weights) == line


def test_compute_is_the_models_flops(random_seed):
    """Forward and backward of all stages are 3 forwards, but for flash attention's backward."""
    draw = random.Random(random_seed)
    recipe = RECIPES[draw.choice(('3b', '9b', '27b'))]
    fast = dataclasses.replace(
        H100, gemm_efficiency=1.0, attention_efficiency=1.0, memory_gb_s=1e30
    )
    shape = recipe.shape('standard')
    model = CostModel(shape, fast, BytesModel(fast))
    layout = Layout(2, pp=2, schedule=draw.choice(SCHEDULES))
    stages = model.stages(layout)
    found = sum(stage.forward + stage.input_grad + stage.weight_grad for stage in stages)
    from megatron_mhc.model_flops import token_flops

    extra = 0.5 * token_flops(shape)['attention_core'] * shape.sequence
    assert found * 989e12 == pytest.approx(step_flops(shape, 1) + extra, rel=1e-9)


FASTER = ('tflops', 'memory_gb_s', 'nvlink_gb_s', 'network_gb_s')


@settings(max_examples=25, deadline=None)
@given(
    field=st.sampled_from(FASTER),
    factor=st.floats(1.0, 8.0),
    tp=st.sampled_from((1, 2, 8)),
    ep=st.sampled_from((1, 4, 8)),
)
def test_faster_parts_never_make_a_slower_step(field, factor, tp, ep):
    better = dataclasses.replace(H100, **{field: getattr(H100, field) * factor})
    sizes = {'tp': (tp,), 'pp': (1, 2, 4), 'ep': (ep,), 'recompute': ('none', 'stage')}
    before, after = (study_of('9b', 512, hardware, **sizes).points for hardware in (H100, better))
    for slow, fast in zip(before, after, strict=True):
        assert fast.step_s <= slow.step_s * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(streams=st.lists(st.integers(1, 12), min_size=2, max_size=4, unique=True).map(sorted))
def test_more_streams_cost_more(streams):
    study = study_of('3b', 320, pp=(1, 2), ep=(4,), streams=tuple(streams))
    found = [[p for p in points] for points in study.streams.values()]
    for few, many in zip(found, found[1:], strict=False):
        for a, b in zip(few, many, strict=True):
            assert b.step_s > a.step_s and b.mhc_overhead > a.mhc_overhead > 0
            assert b.memory_gib > a.memory_gib
            assert b.pp_bytes * a.streams == a.pp_bytes * b.streams


def test_rebuilding_costs_time_and_saves_memory():
    none, auto = study_of(schedule=('1f1b',), recompute=('none', 'auto')).points
    assert auto.step_s > none.step_s and auto.memory_gib < none.memory_gib
    standard = study_of(schedule=('1f1b',), residual='standard').points[0]
    assert standard.mhc_overhead == 0 and standard.step_s < none.step_s
    assert none.step_s == pytest.approx(standard.step_s * (1 + none.mhc_overhead))


def test_only_the_last_block_is_rebuilt_ahead_of_a_v():
    residual = ResidualConfig('mhc', recompute_layer_num=4)
    shape = dataclasses.replace(RECIPES['3b'].shape(), residual=residual)
    model = CostModel(shape, H100, BytesModel(H100))
    # Six layers a stage: 12 sublayers, three blocks.
    first = model.stages(Layout(1, schedule='1f1b'))[0]
    assert first.recompute == 0 and block_size(4, 4, 12) == 4
    once = BytesModel(H100).sublayer(residual, 1280, 4096).forward
    v = model.stages(Layout(2, pp=2, schedule='zb-v'))
    assert [stage.recompute for stage in v] == pytest.approx([2 * once] * 4)


def test_the_front_is_not_beaten_and_the_best_is_on_it():
    points = study_of(tp=(1, 2), pp=(1, 2, 4), ep=(1, 2, 4, 8), recompute=('none', 'auto')).points
    front = pareto(points)
    for point in points:
        beaten = [
            p
            for p in points
            if p.fits and p.step_s < point.step_s and p.memory_gib <= point.memory_gib
        ]
        assert (point in front) == (point.fits and not beaten)
    assert front[0] == best_of(points)
    for point in points:
        parts = breakdown(point)
        assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(point.step_s)


def test_every_layout_is_found_or_refused():
    sweep = Sweep((64, 96), (1, 3, 8), (1, 4, 16), (1, 5, 8), vpp=(2, 4), micro_batch=(1, 3))
    layouts, refused = legal_layouts(sweep, RECIPES['27b'].shape(), 1280)
    assert len(layouts) + refused.total() == sum(1 for _ in sweep.combinations())
    for layout in layouts:
        rank_memory(RECIPES['27b'].shape(), layout, 1280)
    words = {reason.words for reason in refused}
    assert {'fewer layers than stages', 'the experts do not divide by ep'} <= words


def test_published_figures():
    """Zero-bubble and DualPipe tables to all digits; mHC's figure is what our assumptions make."""
    rows = calibration()
    tables = [row for row in rows if row.source in ('ZB, as it counts hops', 'DualPipe table')]
    assert len(tables) == 12 + 18 and all(abs(row.error) < 6e-5 for row in tables)
    lines = [row for row in rows if row.source == 'ZB table 5']
    exact = [row for row in lines if 'interleaved' not in row.setting]
    assert len(exact) == 24 and all(abs(row.error) < 6e-5 for row in exact)
    mhc = [row.ours for row in rows if row.source == 'mHC 4.3.3']
    assert len(mhc) == 4 and 0.067 < min(mhc) and max(mhc) < 0.1


def test_ten_thousand_layouts_in_a_minute():
    sizes = {'tp': (1, 2, 4, 8), 'pp': (1, 2, 4, 8), 'ep': (1, 2, 4, 8), 'micro_batch': (1, 2, 4)}
    start = time.perf_counter()
    study = study_of(
        *('27b', 5120),
        gpus=(512, 1024, 2048),
        **sizes,
        vpp=(2, 3),
        streams=(2, 4),
        recompute=('none', 'auto', 'stage', 4),
    )
    assert len(study.points) >= 10_000
    assert time.perf_counter() - start < 60


def test_ten_thousand_gpus(command):
    status, out, _ = command('27b --gpus 10000 --global-batch-size 10000 --json')
    found = json.loads(out)
    assert status == 0 and len(found['points']) > 10
    assert found['best'][0]['gpus'] == 10_000


BENCH = Path(__file__).resolve().parents[1] / 'tools' / 'bench'


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """``measured(us, **changes)``: a CSV as the bench writes it."""
    monkeypatch.setattr(sys, 'path', [str(BENCH), *sys.path])
    from bench_cases import Case as Shape
    from bench_measure import COLUMNS, status_row

    def write(us: dict[str, float], **changes) -> Path:
        path = tmp_path / 'results.csv'
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for direction, time_us in us.items():
                row = status_row(Shape(2560, 8192, 4), 'triton', 'layer', 'ok').as_dict()
                row |= {'direction': direction, 'mode': 'graph', 'median_us': time_us} | changes
                writer.writerow(row)
        return path

    return write


def test_measured_kernels_replace_the_bytes(measured, command):
    path = measured({'fwd': 100.0, 'bwd': 250.0})
    residual = ResidualConfig('mhc')
    times = Measured(path, H100).sublayer(residual, 2560, 4096)
    assert times == pytest.approx((50e-6, 125e-6))
    line = f'27b --pp 4 --ep 8 --tp 1 --schedule 1f1b --json --kernel-times {path}'
    slow = measured({'fwd': 1000.0, 'bwd': 2500.0}).rename(path.with_name('slow.csv'))
    measured({'fwd': 100.0, 'bwd': 250.0})
    fast = json.loads(command(line)[1])['points'][0]
    slower = json.loads(command(line.replace(str(path), str(slow)))[1])['points'][0]
    assert slower['mhc_overhead'] > 5 * fast['mhc_overhead'] > 0


@pytest.mark.parametrize(
    'us, changes, message',
    [
        ({'fwd': 1.0}, {}, 'no row of op layer'),
        ({'fwd': 1.0, 'bwd': 1.0}, {'mode': 'cpu'}, 'no row of op layer'),
        ({'fwd': 1.0, 'bwd': 1.0}, {'status': 'failed: x'}, 'no row of op layer'),
        ({'fwd': 1.0, 'bwd': -1.0}, {}, 'not above 0'),
        ({'fwd': 1.0, 'bwd': 'x'}, {}, 'not a results.csv of tools/bench'),
        ({'fwd': 1.0, 'bwd': 1.0}, {'hidden': 64}, 'nothing for hidden size 2560 and 4 streams'),
    ],
)
def test_kernel_times_that_do_not_serve_are_refused(measured, command, us, changes, message):
    status, out, error = command(f'27b --kernel-times {measured(us, **changes)}')
    assert status == 2 and not out and error.count('\n') == 1
    assert message in error


def test_a_machine_of_ones_own(tmp_path, command):
    path = tmp_path / 'mine.yaml'
    path.write_text('preset: h200\nnetwork_gb_s: 25\ntflops: 9e2\n')
    mine = hardware_of(str(path), ['latency_us=0'])
    expected = dataclasses.replace(
        PRESETS['h200'], name='mine', network_gb_s=25, tflops=900, latency_us=0
    )
    assert mine == expected
    found = json.loads(command(f'27b --pp 4 --hardware {path} --json')[1])
    assert found['hardware']['network_gb_s'] == 25


@pytest.mark.parametrize(
    'text, message',
    [
        ('preset: h100\nnvlink: 3\n', "there is no field 'nvlink'"),
        ('tflops: 100\n', 'memory_gib is missing; add it, or preset: h100'),
        ('preset: h100\ntflops: fast\n', "tflops='fast': wanted float"),
        ('preset: h100\ntflops: -1\n', 'tflops=-1.0: give a finite number above 0'),
        ('preset: h100\ngemm_efficiency: 1.5\n', 'a share; give at most 1'),
        ('preset: h300\n', 'preset: h300: choose one of a100'),
        ('- a\n', 'wanted "field: value" lines'),
        ('a: [\n', 'not YAML'),
        ('!!python/object/apply:os.getcwd []\n', 'not YAML'),
    ],
)
def test_wrong_machines_are_refused_in_one_line(tmp_path, command, text, message):
    path = tmp_path / 'mine.yaml'
    path.write_text(text)
    status, out, error = command(f'27b --hardware {path}')
    assert status == 2 and not out and error.count('\n') == 1
    assert message in error


@pytest.mark.parametrize(
    'line, message',
    [
        ('', 'name a recipe, 3b, 9b'),
        ('27b --calibrate', '--calibrate has models of its own'),
        ('27b --hardware h300', '--hardware h300: choose a100, h100'),
        ('27b --set speed=1', "--set speed=1: there is no field 'speed'"),
        ('27b --set tflops', '--set tflops: wanted FIELD=VALUE'),
        ('27b --tp 3', 'do not divide by tp; choose a --tp that divides 32'),
        ('27b --ep 5', 'do not divide by ep; choose an --ep that divides 72'),
        ('27b --pp 32', 'fewer layers than stages; choose --pp'),
        ('27b --gpus 1000', 'change --global-batch-size 1280'),
        ('27b --gpus 63 --tp 1 --pp 2', 'change --gpus 63, --tp or --pp'),
        ('27b --gpus 1024 --tp 1 --pp 8 --schedule dualpipev', 'at least 2 x pp microbatches'),
        ('27b --gpus 1024 --tp 1 --pp 8 --schedule interleaved', 'a multiple of pp microbatches'),
        ('27b --dp 7', 'change --dp or --gpus 64'),
        ('27b --vpp 4 --schedule zb-v', '--vpp 4 has no effect with --schedule zb-v'),
        ('27b --pp 1 --schedule zb-v', '--schedule zb-v has no effect with --pp 1'),
        ('27b --recompute 0', '--mhc-recompute-layer-num 0: wanted none'),
        ('27b --residual-type standard --recompute auto', '--recompute has no effect'),
        ('27b --output /dev/null/x', '--output /dev/null/x: Not a directory'),
        ('27b --kernel-times /nowhere', '--kernel-times /nowhere: No such file'),
        ('27b --gpus 0', 'give an integer of at least 1'),
    ],
)
def test_refusals_are_one_line_with_a_remedy(command, line, message):
    status, out, error = command(line)
    assert status == 2 and not out and error.count('\n') == 1
    assert error.startswith('megatron-mhc study: error: ') and message in error


def test_what_is_printed(command):
    status, out, error = command('27b --gpus 64 --top 2 --num-residual-streams 2 4')
    assert status == 0 and not error
    assert 'more layouts do not exist:' in out and 'fewer layers than stages' in out
    assert out.count('best of those that fit') == 2 and '--mhc-num-residual-streams 2' in out
    status, out, _ = command('27b --gpus 8 --hardware h100 --tp 1 --pp 1 --ep 1')
    assert status == 1 and 'nothing fits: the least memory is' in out and '--num-layers' not in out


def test_files(command, tmp_path):
    folder = tmp_path / 'new' / 'folder'
    status, out, _ = command(f'3b --gpus 16 --output {folder} --json')
    points = json.loads(out)['points']
    with (folder / 'points.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert status == 0 and len(rows) == len(points)
    assert [row['schedule'] for row in rows] == [point['schedule'] for point in points]
    assert (folder / 'study.png').read_bytes().startswith(b'\x89PNG')
    assert '--hidden-size 1280' in (folder / 'flags-n4.sh').read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        *('flags-n4.sh', 'pareto.csv', 'points.csv', 'study.png'),
    ]
