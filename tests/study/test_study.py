"""The scaling study: one formula with schedules and memory, sane rankings, speed."""

from __future__ import annotations

import argparse
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mhc import ResidualConfig
from megatron_mhc.recipes.recipe import RECIPES, residual_flags
from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.lowering import place_recompute
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.stage_layers import layer_counts
from megatron_mhc.schedules.times import Times
from megatron_mhc.settings.recompute_cost import segment_size
from megatron_mhc.sizing.flops import step_flops, token_flops
from megatron_mhc.sizing.memory import Layout, edge_bytes, rank_memory, stages_of
from megatron_mhc.sizing.size import parameters
from megatron_mhc.study.calibrate import calibration
from megatron_mhc.study.choices import sweep_of
from megatron_mhc.study.costs import CostModel
from megatron_mhc.study.estimate import run_study, variants
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.links import Group, groups_of
from megatron_mhc.study.pipeline import EXACT, Case, run_steps
from megatron_mhc.study.points import best_of, breakdown, pareto
from megatron_mhc.study.presets import PRESETS
from megatron_mhc.study.seconds import Costs
from megatron_mhc.study.sweep import Sweep, legal_layouts

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
        plan = place_recompute(plan) if rebuilt else plan
        still = simulate(plan, dataclasses.replace(times, hop=0)).makespan
        expected.append((simulate(plan, times), still))
    for step, (timeline, still) in zip(run_steps(cases), expected, strict=True):
        assert step.makespan == pytest.approx(timeline.makespan)
        assert step.work == pytest.approx(timeline.work)
        assert step.bubble_share == pytest.approx(timeline.bubble_share)
        assert step.hops == pytest.approx(timeline.makespan - still) and step.exchange == 0


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
    """27B on one rank: L = 60 sublayers; 10 segments of 6 keep less than 20 of 3."""
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


def test_the_last_stage_has_the_least_layers_where_they_do_not_divide():
    """By hand: no stage has more than the next whole number, none has none."""
    assert layer_counts(30, 4, 'line', 1) == [8, 8, 8, 6]
    assert layer_counts(30, 4, 'interleaved', 2) == [4, 4, 4, 4, 4, 4, 4, 2]
    assert layer_counts(18, 8, 'line', 1) == [2, 3, 3, 3, 2, 2, 2, 1]
    assert layer_counts(9, 8, 'line', 1) == [1, 2, 1, 1, 1, 1, 1, 1]
    assert layer_counts(32, 8, 'line', 1) == [4] * 8
    for layers in range(6, 50):
        counts = layer_counts(layers, 3, 'interleaved', 2)
        assert sum(counts) == layers and max(counts) == -(-layers // 6)
        assert min(counts) == counts[-1] >= 1
    # Two chunks a rank: stage = chunk x 4 + rank.
    shape = RECIPES['27b'].shape()
    assert [rank[1][0] for rank in stages_of(shape, 4, 'interleaved', 2)] == [16, 20, 24, 28]


def test_a_tenth_of_the_memory_stays_free():
    needed = study_of(schedule=('1f1b',)).points[0].memory_gib
    for memory, fits in ((needed / 0.89, True), (needed / 0.91, False)):
        hardware = dataclasses.replace(H100, memory_gib=memory)
        assert study_of(schedule=('1f1b',), hardware=hardware).points[0].fits == fits


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


def test_single_pass_sends_h_pre_along():
    """Per microbatch: a message each way, and in it n values of fp32 a token, in bf16 streams."""
    usual, single = (
        study_of(schedule=('1f1b',), residual=residual, recompute=('none',)).points[0]
        for residual in (ResidualConfig(), ResidualConfig(single_pass=True))
    )
    assert single.pp_bytes - usual.pp_bytes == usual.microbatches * 2 * 4096 * 4 * 6


def test_single_pass_has_no_segments():
    """Unless asked for, and then it says why."""
    names = 'gpus tp cp pp ep dp vpp schedule scaling segments micro_batch_size precision'
    options = argparse.Namespace(**dict.fromkeys([*names.split(), 'num_residual_streams']))
    shape = RECIPES['27b'].shape(ResidualConfig(single_pass=True))
    assert sweep_of(options, shape, H100).recompute == ('none',)
    assert sweep_of(options, RECIPES['27b'].shape('mhc'), H100).recompute == ('auto',)
    options.segments = ['full', 3]
    with pytest.raises(ValueError, match='--segments 3 cannot be combined with --mhc-single-pass'):
        sweep_of(options, shape, H100)


def test_only_the_last_block_is_rebuilt_ahead_of_a_v():
    residual = ResidualConfig('mhc', recompute_layer_num=4)
    shape = dataclasses.replace(RECIPES['3b'].shape(), residual=residual)
    model = CostModel(shape, H100, BytesModel(H100))
    # Six layers a stage: 12 sublayers, three blocks.
    first = model.stages(Layout(1, schedule='1f1b'))[0]
    assert first.recompute == 0 and segment_size(4, 4, 12) == 4
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


def test_thousands_of_layouts(planned):
    """Work that does not grow with them: each plan is made once, and short ones stand for long."""
    sizes = {'tp': (1, 2, 4, 8), 'pp': (1, 2, 4, 8), 'ep': (1, 2, 4, 8), 'micro_batch': (1, 2, 4)}
    more = {'vpp': (2, 3), 'streams': (2, 4), 'recompute': ('none', 'auto', 'stage', 4)}
    study = study_of(*('27b', 5120), gpus=(512,), **sizes, **more)
    assert len(study.points) >= 3_000
    assert len(planned) < 260 and sum(planned) < 70_000


def test_groups_leave_their_node_by_all_adapters_in_it():
    ideal = dataclasses.replace(H100, link_efficiency=1.0, latency_us=0)
    node, pairs, alone = (Group(ideal, *one) for one in ((8, 1), (8, 4), (8, 8)))
    assert (node.together, pairs.together, alone.together) == (8, 2, 1)
    sent = 7 / 8 * 450e9
    assert node.gather_seconds(450e9) == pytest.approx(sent / 450e9)
    assert pairs.gather_seconds(450e9) == pytest.approx(sent / 100e9)
    assert alone.gather_seconds(450e9) == pytest.approx(sent / 50e9)
    # One of 8 shares stays, one goes by NVLink, six by the network.
    assert pairs.exchange_seconds(8e9) == pytest.approx(6e9 / 50e9)
    assert node.exchange_seconds(8e9) == pytest.approx(7e9 / 450e9)
    assert node.message_seconds(9e9) == 0.02 and alone.message_seconds(9e9) == 0.18
    assert Group(ideal, 1, 8).gather_seconds(1e9) == 0


def test_ranks_lie_as_megatron_numbers_them():
    groups = groups_of(Layout(64, pp=4, ep=2, tp=2), H100)
    strides = [getattr(groups, name).stride for name in ('tp', 'ep', 'dp', 'expert_dp', 'pp')]
    assert strides == [1, 2, 2, 4, 16]


def test_optimizer_and_data_parallelism_count_parameters_once(random_seed):
    """Adam moves 30 bytes a parameter; a ring sends fp32 gradients and bf16 weights (n - 1) / n."""
    name = random.Random(random_seed).choice(('3b', '9b'))
    total = parameters(RECIPES[name].shape('standard')).total()
    sizes = {'pp': (1,), 'ep': (1,), 'residual': 'standard'}
    point = study_of(name, 8, gpus=(4,), **sizes).points[0]
    assert point.optimizer_s * H100.bandwidth == pytest.approx(30 * total / 4)
    assert point.dp_bytes == pytest.approx(6 * total * 3 / 4)
    assert study_of(name, 8, gpus=(1,), **sizes).points[0].exposed_dp_s == 0


def test_what_hides_f_post_res_of_the_mlp_takes_half_of_it():
    residual = ResidualConfig('mhc')
    whole = BytesModel(H100).sublayer(residual, 2560, 4096)
    hidden = dataclasses.replace(H100, post_overlap=1.0)
    rest = BytesModel(hidden).sublayer(residual, 2560, 4096)
    # n = 4: 14 vectors of C forward, of which F_post,res adds 5 to the passes that stay; 28 and 10.
    assert rest.forward / whole.forward == pytest.approx((14 - 5 / 2) / 14, rel=0.01)
    assert rest.backward / whole.backward == pytest.approx((28 - 10 / 2) / 28, rel=0.01)


def test_a_type_without_streams_costs_one():
    """``enabled`` is not ``has_streams``: dense connections have neither n streams nor our maps."""
    dense, plain = ResidualConfig('mudd'), ResidualConfig('standard')
    assert (dense.streams, dense.has_streams, dense.enabled) == (1, False, True)
    mudd = RECIPES['27b'].shape(dense)
    assert variants(mudd, Sweep((8,), (1,), (1,), (1,))) == [mudd]
    point = study_of(gpus=(64,)).points[0]
    assert dataclasses.replace(point, residual=dense).streams == 1
    kernels = BytesModel(H100)
    assert kernels.sublayer(dense, 256, 64) == kernels.sublayer(plain, 256, 64)
    assert kernels.sublayer(dense, 256, 64) != kernels.sublayer(ResidualConfig('hc'), 256, 64)
    layout, shape = point.layout, RECIPES['27b'].shape('standard')
    widened = dataclasses.replace(shape, residual=dense)
    one, other = (CostModel(model, H100, kernels).stages(layout)[0] for model in (shape, widened))
    assert one.forward == other.forward and one.recompute == other.recompute
    kept = {rank_memory(model, layout, 256)[0].kept for model in (shape, widened)}
    assert len(kept) == 1 and residual_flags(dense) == {'residual-type': 'mudd'}
