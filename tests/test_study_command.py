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
from megatron_mhc.cli import main
from megatron_mhc.study_hardware import PRESETS, hardware_of
from megatron_mhc.study_kernels import Measured

H100 = PRESETS['h100']


@pytest.fixture
def command(capsys):
    """``command(words)``: exit status, stdout and stderr of ``megatron-mhc study words``."""

    def run(line: str):
        with pytest.raises(SystemExit) as ended:
            main(['study', *line.split()])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


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
        ('', 'name one of 3b, 9b'),
        ('27b --calibrate', '--calibrate has models of its own'),
        ('--calibrate --set tflops=1', '--set has no effect with --calibrate'),
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
        ('27b --recompute 0', 'argument --recompute: 0: wanted an integer from 1'),
        ('27b --residual-type standard --recompute auto', '--recompute has no effect'),
        ('27b --output /dev/null/x', '--output /dev/null/x: Not a directory'),
        ('27b --kernel-times /nowhere', 'argument --kernel-times: /nowhere: No such file'),
        ('27b --gpus 0', 'argument --gpus: 0: wanted an integer from 1'),
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
