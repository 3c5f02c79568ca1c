"""``megatron-mhc study``: what it prints and writes, machines and times of one's own, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_mhc import ResidualConfig
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.sizing.memory import Layout, rank_memory
from megatron_mhc.study.calibrate import Row, as_text
from megatron_mhc.study.estimate import run_study
from megatron_mhc.study.kernels import BytesModel, Measured
from megatron_mhc.study.output import points_table, verdict
from megatron_mhc.study.presets import PRESETS, hardware_of
from megatron_mhc.study.sweep import Sweep

H100 = PRESETS['h100']


@pytest.fixture
def command(answer):
    return lambda words: answer(f'study {words}')


def test_a_hundred_thousand_gpus(command, planned):
    status, out, _ = command('27b --gpus 100000 --global-batch-size 100000 --json')
    assert len(planned) < 180 and sum(planned) < 15_000
    found = json.loads(out)
    assert status == 0 and len(found['points']) > 100
    assert found['best'][0]['gpus'] == 100_000


BENCH = Path(__file__).resolve().parents[2] / 'tools' / 'bench'


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """``measured(us, **changes)``: a CSV as the bench writes it."""
    monkeypatch.setattr(sys, 'path', [str(BENCH), *sys.path])
    from bench_measure import COLUMNS, status_row

    from megatron_mhc.kernels.peers.contender import Case as Shape

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
        (
            {'fwd': 1.0, 'bwd': 1.0},
            {'hidden': 64},
            'nothing for hidden size 2560 and 4 streams in bf16',
        ),
        ({'fwd': 1.0, 'bwd': 1.0}, {'dtype': 'fp16'}, 'no row of op layer'),
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
        ('preset: h100\nnvlink: 3\n', 'there is no field nvlink'),
        ('tflops: 100\n', 'memory_gib is missing; add it, or preset: h100'),
        ('preset: h100\ntflops: fast\n', 'tflops=fast: wanted float'),
        ('preset: h100\ntflops: -1\n', 'tflops=-1.0: give a finite number above 0'),
        ('preset: h100\ngemm_efficiency: 1.5\n', 'a share; give at most 1'),
        ('preset: h300\n', 'preset: h300: choose one of a100'),
        ('- a\n', 'wanted "field: value" lines'),
        ('a: [\n', 'not YAML'),
        ('!!python/object/apply:os.getcwd []\n', 'not YAML'),
        ('preset: h100\ngpus_per_node: .inf\n', 'gpus_per_node=inf: wanted int'),
        ('preset: h100\ngpus_per_node: .nan\n', 'gpus_per_node=nan: wanted int'),
        ('preset: h100\ngpus_per_node: 8.5\n', 'gpus_per_node=8.5: wanted int'),
        ('preset: h100\ngpus_per_node: [8]\n', 'gpus_per_node=[8]: wanted int'),
        ('preset: h100\ngpus_per_node: yes\n', 'gpus_per_node=True: wanted int'),
        (f'preset: h100\ngpus_per_node: {"9" * 400}\n', 'gpus_per_node: no machine has more than'),
        (
            f'preset: h100\ntflops: {"9" * 400}\n',
            f'{"9" * 60}... (400 characters): wanted float',
        ),
        (f'preset: h100\ntflops: {"9" * 5000}\n', 'a value that cannot be: Exceeds the limit'),
        (
            f'preset: h100\ntflops: "{"9" * 5000}"\n',
            f'{"9" * 60}... (5000 characters): wanted',
        ),
        ('preset: h100\ntflops: 1.0e+300\n', 'tflops: no machine has more than 1e+30'),
        ('preset: h100\ntflops: .inf\n', 'tflops: no machine has more than 1e+30'),
        ('preset: h100\ntflops: .nan\n', 'tflops=nan: wanted float'),
        ('preset: h100\ntflops: null\n', 'tflops=None: wanted float'),
        ('preset: h100\ntflops: 2026-13-45\n', 'a value that cannot be: month must be'),
        ('preset: [h100]\n', "preset: ['h100']: choose one of a100"),
        ('preset: {h100: 1}\n', "preset: {'h100': 1}: choose one of a100"),
        ('preset: h100\nname: [a]\n', "name=['a']: wanted str"),
        ('preset: h100\n[1, 2]: 3\n', 'not YAML'),
        ('preset: h100\n7: 3\n', 'there is no field 7'),
        ('[' * 5000, 'a value that cannot be: maximum recursion depth'),
    ],
)
def test_wrong_machines_are_refused_in_one_line(tmp_path, command, text, message):
    path = tmp_path / 'mine.yaml'
    path.write_text(text)
    status, out, error = command(f'27b --hardware {path}')
    assert status == 2 and not out and error.count('\n') == 1
    assert message in error


# Values of an axis; of three of them there are too many combinations.
_MANY = ' '.join(map(str, range(1, 101)))


@pytest.mark.parametrize(
    'line, message',
    [
        ('', 'name one of 3b, 9b'),
        ('27b --calibrate', '--calibrate has models of its own'),
        ('--calibrate --set tflops=1', '--set has no effect with --calibrate'),
        ('27b --hardware h300', '--hardware h300: choose a100, h800, h100'),
        ('27b --set speed=1', '--set speed=1: there is no field speed'),
        ('27b --set tflops', '--set tflops: wanted FIELD=VALUE'),
        ('27b --tp 3', 'do not divide by tp; choose a --tp that divides 32'),
        ('27b --ep 5', 'do not divide by ep; choose an --ep that divides 72'),
        ('27b --pp 32', 'fewer layers than stages; choose --pp'),
        ('27b --gpus 1000', 'change --global-batch-size 1280'),
        ('27b --gpus 63 --tp 1 --pp 2', 'change --gpus 63, --tp or --pp'),
        ('27b --gpus 63 --tp 1 --pp 1 --cp 2', 'change --gpus 63, --tp, --cp or --pp'),
        (f'27b --cp {_MANY} --gpus {_MANY} --pp {_MANY}', '--precision'),
        ('27b --gpus 1024 --tp 1 --pp 8 --schedule dualpipev', 'at least 2 x pp microbatches'),
        ('27b --gpus 1024 --tp 1 --pp 8 --schedule interleaved', 'a multiple of pp microbatches'),
        ('27b --dp 7', 'change --dp or --gpus 64'),
        ('27b --vpp 4 --schedule zb-v', '--vpp 4 has no effect with --schedule zb-v'),
        ('27b --pp 1 --schedule zb-v', '--schedule zb-v has no effect with --pp 1'),
        ('27b --pp 1 --vpp 3', '--vpp 3 has no effect with --pp 1'),
        *(
            (f'--calibrate {words}', f'{words.split()[0]} has no effect with --calibrate')
            for words in ('--hardware h200', '--top 3', '--residual-type hc', '--segments 2')
        ),
        ('27b --recompute 0', 'argument --recompute: 0: wanted an integer from 1'),
        ('27b --residual-type standard --recompute auto', '--segments has no effect'),
        ('27b --output /dev/null/x', '--output /dev/null/x: Not a directory'),
        ('27b --kernel-times /nowhere', 'argument --kernel-times: /nowhere: No such file'),
        ('27b --gpus 0', 'argument --gpus: 0: wanted an integer from 1'),
        *(
            (f'27b {flag} {digits}', 'wanted an integer from 1')
            for digits in ('9' * 400, '9' * 5000)
            for flag in ('--gpus', '--vpp', '--top', '--num-residual-streams', '--recompute')
        ),
        (f'27b --global-batch-size {"9" * 400}', 'wanted an integer from 1'),
        ('27b --gpus ²', '²: wanted an integer from 1'),
        ('27b --hardware /dev/zero.yaml', '--hardware /dev/zero.yaml: No such file'),
        (f'27b --set gpus_per_node={"9" * 400}', 'gpus_per_node=9999'),
        ('27b --set gpus_per_node=8.5', 'gpus_per_node=8.5: wanted int'),
        ('27b --set tflops=inf', 'tflops: no machine has more than'),
        *(
            (f'--model --seq-length 64 {words}', 'that is what a study chooses; drop it')
            for words in ('--recompute-granularity full', '--fp8-format=hybrid')
        ),
        ('27b --residual-type mudd', '--residual-type: mudd: a study does not know its kernels'),
        (
            '27b --recompute full --schedule zb-v',
            'choose --schedule 1f1b or interleaved, or another --segments',
        ),
        ('27b --hardware a100 --precision fp8', 'A100 80 GB has no fp8'),
        ('27b --precision fp4', "invalid choice: 'fp4'"),
        ('27b --train-tokens 1X', 'argument --train-tokens: 1X: wanted a finite number'),
        ('27b --train-tokens 0', 'argument --train-tokens: 0.0: wanted a finite number above 0'),
        ('27b --gpu-hour-price 0', 'argument --gpu-hour-price: 0: wanted a finite number above 0'),
        ('27b --launch-scripts /dev/null/x', '--launch-scripts /dev/null/x: Not a directory'),
        ('27b --scaling weak', '--scaling weak has no effect with one number of GPUs; give --gpus'),
        ('--calibrate --scaling weak', '--scaling has no effect with --calibrate'),
        (
            '27b --residual-type x',
            '--residual-type: x: there is no such type; use standard, hc or mhc',
        ),
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


def test_nothing_is_minus_zero():
    sweep = Sweep((64,), (1,), (4,), (8,), schedule=('1f1b',))
    study = run_study(RECIPES['27b'].shape(), 1280, sweep, H100, BytesModel(H100))
    tiny = {'mhc_overhead': -1e-9, 'bubble_share': -1e-9}
    point = dataclasses.replace(study.points[0], **tiny)
    assert '-0.0%' not in points_table([point]) + verdict([point], H100)
    row = Row('ours', 'a rounding', 1.0, 1.0 - 1e-9, 'share')
    assert '-0.0' not in as_text([row, row._replace(unit='units')])


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


def test_the_name_of_a_machine_is_no_formula(command, tmp_path):
    line = r'3b --gpus 8 16 --tp 1 --pp 1 --ep 8 --set name=$\bad$'
    status, out, error = command(f'{line} --output {tmp_path}')
    assert status == 0 and not error and r'$\bad$' in out
    assert (tmp_path / 'scaling.png').exists() and (tmp_path / 'study.png').exists()


def test_calibration_is_printed_with_its_errors_and_assumptions(command):
    status, out, _ = command('--calibrate')
    assert status == 0 and 'ZB table 5: 36 figures, largest error 0.0035' in out
    assert 'nothing was fitted' in out and '+0.0255' in out
    rows = json.loads(command('--calibrate --json')[1])
    assert len(rows) == 36 + 12 + 18 + 4 and all('error' in row for row in rows)


def test_a_terminal_gets_a_bar_and_a_pipe_none():
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (40, 100))
    command = [sys.executable, '-m', 'megatron_mhc', 'study', '27b', '--gpus', '256']
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, check=True, text=True)
    assert 'best of those that fit' in done.stdout
    os.set_blocking(terminal, False)
    assert b'case' in os.read(terminal, 4096)
    os.close(side)
    os.close(terminal)
    assert subprocess.run(command, capture_output=True, check=True).stderr == b''


def test_a_terminal_without_tqdm_gets_a_count(command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    status, out, error = command('3b --gpus 8 --tp 1 --pp 1 --ep 8 --json')
    assert status == 0 and json.loads(out) and 'study: 4/4' in error and error.endswith('\r')


LAYOUT = '27b --gpus 64 --tp {} --pp 4 --ep 8 --schedule dualpipev --hardware {} --set {}'


@pytest.mark.parametrize('machine, tp, alone', [('h100', 2, True), ('h100', 1, False)] + [
    ('a100', 2, True), ('b200', 2, False)
])  # fmt: skip
def test_what_megatron_demands_is_not_contradicted(command, machine, tp, alone):
    """One hardware queue: nothing overlaps, no flag asks for it, and the line says what else."""
    line = LAYOUT.format(tp, machine, 'post_overlap=0.5')
    (best,) = json.loads(command(f'{line} --json')[1])['best']
    connections = best['environment']['CUDA_DEVICE_MAX_CONNECTIONS']
    assert (connections, best['one_queue']) == (('1', True) if alone else ('32', False))
    assert ('--mhc-post-stream high' in best['flags']) != alone
    out = command(line)[1]
    assert f'with CUDA_DEVICE_MAX_CONNECTIONS={connections}' in out
    assert ('a layout with --tp 1 has more queues' in out) == alone
    # With more queues the same layout is faster: slots hide the all-to-all, a stream F_post,res.
    newer = command(f'{line} compute_capability=10 --json')[1]
    (other,) = json.loads(newer)['best']
    assert (other['step_s'] < 0.99 * best['step_s']) == alone
    assert (other['exposed_ep_s'] < 0.9 * best['exposed_ep_s']) == alone


def test_a_way_out_of_one_queue_is_given(command):
    line = LAYOUT.format(2, 'h100', 'latency_us=10')
    assert 'with --overlap-moe-expert-parallel-comm and a stock schedule' in command(line)[1]


def test_racks_join_more_gpus_than_a_host_has(command, tmp_path):
    """72 GPUs on NVLink, of which 4 a host: links count by the one, launches by the other."""
    h800, rack = PRESETS['h800'], PRESETS['gb200']
    assert h800.nvlink_gb_s < H100.nvlink_gb_s and h800.tflops == H100.tflops
    assert (rack.gpus_per_node, rack.ranks_per_host) == (64, 4)
    assert PRESETS['gb300'].network_gb_s == 2 * rack.network_gb_s
    command(f'27b --gpus 64 --tp 1 --pp 2 --ep 8 --hardware gb200 --launch-scripts {tmp_path}')
    assert '--nproc-per-node 4' in (tmp_path / 'gpus-64-n4.sh').read_text()
    assert '#SBATCH --nodes=16' in (tmp_path / 'gpus-64-n4.slurm').read_text()


def test_a_pipe_is_no_machine(tmp_path, command):
    os.mkfifo(tmp_path / 'mine.yaml')
    assert 'not a file' in command(f'27b --hardware {tmp_path}/mine.yaml')[2]


def test_fp32_is_twice_as_wide_and_slower():
    """Bytes of activations, messages and gathers, and fp32's products of matrices."""
    sweep = Sweep((8,), (2,), (2,), (1,), schedule=('1f1b',))
    wide, narrow = (
        run_study(
            dataclasses.replace(RECIPES['3b'].shape(), experts=None, value_bytes=width),
            *(320, sweep, H100, BytesModel(H100)),
        ).points[0]
        for width in (4, 2)
    )
    for key in ('pp_bytes', 'tp_bytes'):
        assert getattr(wide, key) == 2 * getattr(narrow, key) > 0
    # fp32 gradients are reduced in either case, and weights gathered.
    assert wide.dp_bytes == pytest.approx(8 / 6 * narrow.dp_bytes)
    assert wide.step_s > 5 * narrow.step_s and wide.memory_gib > narrow.memory_gib
    assert 0 < wide.mfu < 1
    unknown = dataclasses.replace(H100, fp32_tflops=0)
    with pytest.raises(ValueError, match='fp32_tflops=0: unknown, but the model is fp32; add'):
        run_study(wide_shape(), 320, sweep, unknown, BytesModel(unknown))


def wide_shape():
    return dataclasses.replace(RECIPES['3b'].shape(), value_bytes=4)


def test_states_of_a_model_in_fp32_need_no_master_copy():
    width = {4: (4, 4, 8), 2: (2, 4, 12)}
    for value_bytes, (weight, gradient, optimizer) in width.items():
        shape = dataclasses.replace(RECIPES['3b'].shape('standard'), value_bytes=value_bytes)
        (rank,) = rank_memory(shape, Layout(1), 320)
        count = rank.gradients / gradient
        assert (rank.weights, rank.optimizer) == (weight * count, optimizer * count)


def test_kernel_times_are_of_the_width_of_the_model(measured):
    """Those of bf16 for 2 bytes a value, those of fp32 for 4, and none of one for the other."""
    mhc, us = ResidualConfig('mhc'), {'fwd': 100.0, 'bwd': 250.0}
    for dtype, width, other in (('bf16', 2, 'fp32'), ('fp32', 4, 'bf16')):
        times = Measured(measured(us, dtype=dtype), H100)
        assert times.sublayer(mhc, 2560, 4096, width) == pytest.approx((50e-6, 125e-6))
        with pytest.raises(ValueError, match=f"in {other}; measure .* --dtype {other}', or drop"):
            times.sublayer(mhc, 2560, 4096, 6 - width)
