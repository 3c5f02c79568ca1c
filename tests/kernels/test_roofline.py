"""The model of speed against counts by hand, and what it says where it knows nothing."""

import json
import math

import pytest
import torch

pytest.importorskip('triton')

from megatron_mhc.kernels.roofline import gpus, names, sass  # noqa: E402
from megatron_mhc.kernels.roofline.launches import Shape, lost_percent, sublayer  # noqa: E402
from megatron_mhc.kernels.roofline.measured import measured  # noqa: E402
from megatron_mhc.kernels.roofline.pipes import cycles  # noqa: E402
from megatron_mhc.kernels.roofline.predict import Prediction, Work, predict  # noqa: E402
from megatron_mhc.kernels.roofline.profile import Section, profile  # noqa: E402
from megatron_mhc.kernels.roofline.work import work_of  # noqa: E402
from megatron_mhc.kernels.shipped import shipped_launches  # noqa: E402
from megatron_mhc.kernels.verdict import label  # noqa: E402

H200 = gpus.GPUS['h200']
# 700 ns at 1.7 GHz.
DRAM = 1190
LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   FFMA R4, R8, R8, R4 ;
        /*0040*/                   FFMA R5, R9, R9, R5 ;
        /*0050*/                   MUFU.EX2 R6, R6 ;
        /*0060*/                   IADD3 R2, R2, 0x200, RZ ;
        /*0070*/                   ISETP.NE.AND P0, PT, R2, R3, PT ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""
# Two loads before the first use, then one load behind the use of the other.
TOGETHER = """
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ LDG.E.128 R8, desc[UR4][R12.64] ;
        /*0020*/ FADD R0, R4, R8 ;
"""
APART = """
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ FADD R0, R4, 1 ;
        /*0020*/ LDG.E.128 R8, desc[UR4][R12.64] ;
        /*0030*/ FADD R1, R8, R0 ;
"""


def test_a_loop_counted_by_hand():
    outside, loop = profile(LOOP, H200)
    assert loop.issued == {'lsu': 1, 'fma': 2, 'xu': 1, 'alu': 2, 'control': 1}
    # 128 bits for 32 threads take four of the SM's 128 bytes a clock; 16 of MUFU, 64 of IADD3.
    assert loop.cycles == {'lsu': 4, 'fma': 2, 'xu': 8, 'alu': 4, 'control': 1}
    assert outside.issued == {'control': 3, 'lsu': 2} and outside.cycles['lsu'] == 8
    # The load, then FFMA, FFMA, MUFU, IADD3 a cycle apart, ISETP 5 behind IADD3, BRA 5 behind that
    # and 8 for itself, and one to the next load.
    assert loop.latency == DRAM + 3 + 5 + 5 + 8 + 1
    # S2R, the load in cycle 1, the store that waits for it, EXIT, BRA with its 8.
    assert outside.latency == 1 + DRAM + 1 + 1 + 8 + 1
    assert (loop.loaded, loop.memory, loop.inside) == (512, True, None)


def test_what_waits_behind_a_use_is_not_under_way():
    (together,), (apart,) = profile(TOGETHER, H200), profile(APART, H200)
    assert together.loaded == apart.loaded == 1024
    # The second load issues 4 cycles behind the first, and the sum waits for it.
    assert together.latency == 4 + DRAM + 1
    # Load, sum, one cycle more, load, sum.
    assert apart.latency == DRAM + 1 + DRAM + 1
    work = Work(132, 8, 1, 1000, 0, ())
    wide, narrow = (predict((code,), work, H200).in_flight for code in (together, apart))
    assert wide == pytest.approx(8 * 1024 * DRAM / (400 + 1195))
    assert narrow == pytest.approx(8 * 1024 * DRAM / (400 + 2382))


# A copy, and a wait for all groups of copies but the last few.
COPIES = """
.L_x_1:
        /*0000*/ DEPBAR.LE SB0, {left} ;
        /*0010*/ FADD R0, R0, R1 ;
        /*0020*/ LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0030*/ LDGDEPBAR ;
        /*0040*/ @P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ('left', 'wanted'),
    [
        # From the copy to the wait at the head of the next pass; FADD, and the next copy.
        ('0x0', DRAM + 1 + 1),
        # Two passes for the same, so that each takes half.
        ('0x1', (DRAM + 1 + 1) / 2),
        ('0x3', (DRAM + 1 + 1) / 4),
    ],
)
def test_copies_that_run_ahead_must_still_arrive(left, wanted):
    _, loop = profile(COPIES.format(left=left), H200)
    assert loop.latency == pytest.approx(wanted, abs=12)
    assert (loop.loaded, loop.copied) == (0, 512)


def test_bounds_counted_by_hand():
    """Two blocks of four warps for each of 132 SMs, ten passes of the loop, 43 MB."""
    moved = 43_000_000
    work = Work(264, 4, 2, moved, 0, (10.0,))
    seen = predict(profile(LOOP, H200), work, H200)
    clock, warps = 1.7e9, 8
    wanted = {
        'dram': moved / (4.8e12 * 0.896),
        'l2': moved / 5.5e12,
        'issue': warps * (5 + 10 * 7) / 4 / clock,
        'fma': warps * 10 * 2 / 4 / clock,
        'alu': warps * 10 * 4 / 4 / clock,
        'xu': warps * 10 * 8 / 4 / clock,
        'tensor': 0.0,
        # One for the whole SM.
        'lsu': warps * (8 + 10 * 4) / clock,
        'latency': (400 + 1202 + 10 * 1212) / clock,
    }
    assert seen.bounds == pytest.approx(wanted)
    assert seen.seconds == pytest.approx(math.hypot(*(b**2 for b in wanted.values())) ** 0.5 + 2e-6)
    assert seen.bound == 'dram'
    assert seen.copy_percent == pytest.approx(100 * wanted['dram'] / seen.seconds)
    # A load before the loop and ten in it, each 1190 of the cycles.
    under_way = 4 * 11 * 512 * DRAM / (400 + 1202 + 10 * 1212)
    assert seen.in_flight == pytest.approx(2 * under_way)
    assert seen.per_kilobyte['fma'] == pytest.approx(264 * 4 * 20 / 43_000)
    # One block at a time: twice the latency, half the bytes under way.
    alone = predict(profile(LOOP, H200), Work(264, 4, 1, moved, 0, (10.0,)), H200)
    assert alone.bounds['latency'] == pytest.approx(2 * wanted['latency'])
    assert (alone.in_flight, alone.bound) == (pytest.approx(under_way), 'latency')


@pytest.mark.parametrize(
    ('name', 'gpu', 'wanted'),
    [
        # 64 x 32 x 16 for four warps at 512 a quarter; 16 x 8 x 16 at 62 % of that.
        ('HGMMA.64x32x16.F32.BF16', 'h200', 16),
        ('HMMA.16816.F32.BF16', 'h200', 4 / 0.62),
        ('HMMA.1688.F32.TF32', 'h200', 4 / 0.62),
        ('HMMA.16816.F32.BF16', 'a100', 8),
        # 64 fp32 results a clock on an SM of A100, 128 on one of H100; 64 integer products.
        ('FFMA', 'a100', 2),
        ('FFMA', 'h100', 1),
        ('IMAD', 'h100', 2),
        ('LDSM.16.M88.4', 'h200', 4),
        ('SHFL.BFLY', 'h200', 1),
        ('LDG.E.U16', 'h200', 1),
    ],
)
def test_cycles_of_instructions(name, gpu, wanted):
    assert cycles(sass.Instruction(name), gpus.GPUS[gpu]) == pytest.approx(wanted)


def test_loops_inside_loops():
    text = """
.L_x_1:
    /*0000*/ FADD R0, R0, R1 ;
.L_x_2:
    /*0010*/ FMUL R2, R2, R3 ;
    /*0020*/ @P0 BRA `(.L_x_2) ;
    /*0030*/ @!P1 BRA `(.L_x_1) ;
    /*0040*/ EXIT ;
"""
    code = sass.parse(text)
    assert code.loops == (sass.Loop(0, 3), sass.Loop(1, 2))
    assert [i.name for i in code.own(code.loops[0])] == ['FADD', 'BRA']
    assert [i.guard for i in code.own(code.loops[0])] == ['', 'P1']
    sections = profile(text, H200)
    assert [section.inside for section in sections] == [None, None, 1]
    work = Work(132, 4, 1, 1000, 0, (3.0, 5.0))
    seen = predict(sections, work, H200)
    # 3 additions and 3 x 5 products of 4 warps on 4 quarters.
    assert seen.bounds['fma'] == pytest.approx((3 + 15) / 1.7e9)


def test_text_without_instructions_is_refused():
    with pytest.raises(RuntimeError, match='no instruction'):
        profile('Fatbin elf code:\n', H200)


def section(memory: bool = False, inside: int | None = None) -> Section:
    return Section({}, {}, 10.0, 0, 0, memory, inside)


def passes(name: str, *loops: Section) -> tuple[float, ...]:
    """Passes of ``loops`` in the kernel of this label for n = 4, C = 4096, T = 8192."""
    launches = shipped_launches(4, 4096, 8192, torch.bfloat16)
    launch = next(launch for launch in launches if label(launch) == name)
    return work_of(launch, (section(), *loops), 1).passes


def test_passes_of_our_loops():
    """Sinkhorn's 19 passes behind the first: in backward 4 parts of up to 5, made again inside."""
    walk = section(memory=True)
    assert passes('pre_forward') == ()
    assert passes('post_res_backward', walk) == (16.0,)
    assert passes('projection mix', walk) == (32.0,)
    assert passes('read_backward g u', walk) == (64.0,)
    assert passes('maps_forward', walk, section()) == (8.0, 19.0)
    # 256 programs do Sinkhorn, 2048 walk over channels; passes are in the mean of both.
    share = 256 / 2304
    assert passes('maps_forward u', walk, section(), walk) == (
        *(8 * share, 19 * share),
        16 * (1 - share),
    )
    parts = [section(), section(inside=1), section(), section(inside=3)]
    assert passes('maps_backward', *parts) == (4.75 * share, 2.0, 4.75 * share, 2.0)
    parts = [section(), section(), section(inside=2), walk]
    wanted = (5 * share, 4.75 * share, 2.0, 16 * (1 - share))
    assert passes('maps_backward u', *parts) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ('name', 'loops'),
    [
        ('post_res_backward', 2 * [section(memory=True)]),
        ('post_res_backward', [section()]),
        ('pre_forward', [section(memory=True)]),
        ('maps_forward', 2 * [section(memory=True)]),
    ],
)
def test_loops_that_the_launch_does_not_explain_are_refused(name, loops):
    with pytest.raises(ValueError, match=f'{name}: . loops over memory'):
        passes(name, *loops)


def prediction(percent: float) -> Prediction:
    return Prediction(1.0, {'dram': percent / 100}, {}, 0.0)


def test_what_falls_below_the_record_is_a_problem():
    """A twentieth of the share may go."""
    assert lost_percent(prediction(40.0), None) == []
    assert lost_percent(prediction(76.1), 80.0) == []
    assert lost_percent(prediction(99.0), 80.0) == []
    (problem,) = lost_percent(prediction(75.9), 80.0)
    assert problem.rule == 'predicted' and '75.9 % of copy' in problem.text
    assert 'static model, not measured' in problem.text and '80.0 % on record' in problem.text
    (problem,) = lost_percent(None, 80.0)
    assert 'no longer understands' in problem.text


def test_a_sublayer_beside_its_bytes():
    """42 vectors of 8192 x 4096 bf16 values and the maps, at 4.3 TB/s."""
    shape = Shape(4096, 8192, 'bf16')
    names = ('pack', 'projection mix', 'maps_forward u', 'maps_backward u')
    names += ('read_backward g u', 'post_res_backward')
    found = sublayer(4, shape, 2, H200, dict.fromkeys(names, 1e-4) | {'projection': 1.0})
    maps = 4 * 8192 * (45 + 70 + 95 + 50)
    moved = 42 * 8192 * 4096 * 2 + maps
    assert found['vectors'] == 42 and found['megabytes'] == pytest.approx(moved / 1e6)
    assert found['bytes_us'] == pytest.approx(1e6 * moved / (4.8e12 * 0.896))
    assert found['predicted_us'] == pytest.approx(600)
    assert found['copy_percent'] == pytest.approx(found['bytes_us'] / 6)
    found = sublayer(4, shape, 2, H200, {name: 1e-4 for name in names[1:]})
    assert found['predicted_us'] is None and found['missing'] == ['pack']


def test_gpus_without_constants_are_refused_by_name():
    assert tuple(gpus.GPUS) == names.NAMES and names.RECORDED in names.NAMES
    assert names.known('H100') == 'h100'
    for name, why in {
        'b200': 'tcgen05',
        'rtx4090': 'no constants',
        'mi300x': 'no constants',
    }.items():
        with pytest.raises(ValueError, match=why) as error:
            names.known(name)
        assert str(error.value).startswith(name) and 'h200 h100 a100' in str(error.value)


def test_measured_times_of_the_newest_run(tmp_path):
    shape = Shape(4096, 8192, 'bf16')
    assert measured(tmp_path / 'absent', 'h200', shape) == {}
    run = {'gpu': 'h200', 'hidden_size': 4096, 'tokens': 8192, 'dtype': 'bf16', 'triton': '3.8.0'}
    for folder, date, us in (('a', '2026-12-02', 180.5), ('b', '2026-12-01', 200.0)):
        (tmp_path / folder).mkdir()
        text = json.dumps(run | {'date': date, 'microseconds': {'pre_forward 4': us}})
        (tmp_path / folder / 'kernels.json').write_text(text)
    assert measured(tmp_path, 'h200', shape) == {'pre_forward 4': (180.5, 'a, Triton 3.8.0')}
    assert (
        measured(tmp_path, 'h100', shape) == measured(tmp_path, 'h200', Shape(1, 1, 'bf16')) == {}
    )
    (tmp_path / 'a' / 'kernels.json').write_text('{}')
    with pytest.raises(ValueError, match='have the keys') as error:
        measured(tmp_path, 'h200', shape)
    assert len(str(error.value).splitlines()) == 1
