"""The bench of the ops, on a CPU: that it measures, checks and reports; speed is for a GPU."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / 'tools' / 'bench'
sys.path.insert(0, str(BENCH))

import bench  # noqa: E402
import bench_bytes  # noqa: E402
import bench_calls  # noqa: E402
import bench_environment  # noqa: E402
import bench_measure  # noqa: E402
import bench_ours  # noqa: E402
import bench_peers  # noqa: E402
import bench_report  # noqa: E402
import bench_run  # noqa: E402
import bench_timer  # noqa: E402
import profile_layer  # noqa: E402
from bench_cases import all_cases  # noqa: E402

from megatron_mhc.kernels.peers.contender import (  # noqa: E402
    Case,
    Contender,
    availability,
    transposed_square,
)

TINY = ['--device', 'cpu', '--hidden-sizes', '32', '--tokens', '8', '--num-streams', '2']
CASE = Case(hidden=32, tokens=8, streams=2)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / bench_report.CSV).open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('bench')
    assert bench.main([*TINY, '--peers', 'all', '--output', str(folder)]) == 0
    return folder


def test_a_run_writes_its_report(run):
    for name in (bench_report.CSV, bench_report.MARKDOWN, bench_report.FACTS):
        assert (run / name).stat().st_size
    assert (run / bench_report.CHART).read_bytes().startswith(b'\x89PNG')
    text = (run / bench_report.MARKDOWN).read_text()
    assert 'no speed claim' in text and f'| torch | {torch.__version__} |' in text
    assert '--num-streams 2' in text and '## layer, fwd+bwd' in text


def test_an_earlier_run_of_the_day_is_kept(tmp_path):
    first = bench_environment.new_folder(tmp_path, 'cpu')
    first.mkdir()
    assert bench_environment.new_folder(tmp_path, 'cpu').name == f'{first.name}-2'


def test_every_op_has_its_rows(run):
    rows = [row for row in rows_of(run) if row['contender'] == 'torch']
    assert {row['status'] for row in rows} == {'ok'}
    found = {(row['op'], row['direction']) for row in rows}
    expected = {(op, way) for op in bench_calls.OPS for way in ('fwd', 'bwd')}
    assert found == expected | {(op, 'fwd+bwd') for op in bench_calls.COMPOSITES}
    for row in rows:
        assert float(row['median_us']) > 0 and float(row['times_ours']) == 1
        # Streams are rounded to bf16; a gradient of alpha is a sum that may nearly cancel.
        limit = 1e-6 if row['op'] == 'sinkhorn' else 5e-3
        assert float(row['error_fwd']) < limit and float(row['error_bwd']) < 30 * limit
        assert row['bwd_repeatable'] == ('' if row['direction'] == 'fwd' else 'yes')


def test_the_report_can_be_made_from_the_csv(run):
    before = (run / bench_report.MARKDOWN).read_text()
    bench_report.write_all(run, *bench_report.read_all(run / bench_report.CSV))
    assert (run / bench_report.MARKDOWN).read_text() == before


def test_ideal_bytes():
    case = Case(hidden=4096, tokens=8192, streams=4)
    element, value = 2 * 4096 * 8192, 4 * 8192
    weight = 24 * 4 * 4096 * 4
    # C-wide vectors: the mapping 4, F_pre 5, F_post,res 9; their sum; the fused edge saves a read.
    for op, forward, backward in (
        ('mapping', 4, 8),
        ('pre', 5, 9),
        ('post', 9, 14),
        ('sublayer', 18, 28),
        ('fused_edge', 14, 28),
        ('sinkhorn', 0, 0),
    ):
        assert bench_bytes.ideal_elements(op, 'fwd', 4) == forward
        assert bench_bytes.ideal_elements(op, 'bwd', 4) == backward
        assert bench_bytes.ideal_elements(op, 'fwd+bwd', 4) == forward + backward
    assert bench_bytes.ideal_bytes('pre', 'fwd', case) == 5 * element + 4 * value
    assert bench_bytes.ideal_bytes('post', 'bwd', case) == 14 * element + 40 * value
    assert bench_bytes.ideal_bytes('sinkhorn', 'fwd', case) == 32 * value
    # Beside the streams: the weight, and less than one element's worth of maps.
    for op, direction, elements, weights in (('mapping', 'fwd', 4, 1), ('layer', 'bwd', 28, 2)):
        rest = bench_bytes.ideal_bytes(op, direction, case) - elements * element
        assert weights * weight < rest < weights * weight + element
    # Read 9, fused edge 14, write 9, for two sublayers.
    assert bench_bytes.ideal_elements('layer', 'fwd', 4) == 16
    assert bench_bytes.target('pre', 'fwd', case, 1.0, 0.93) == ('>= 92% of copy', 'met')
    assert bench_bytes.target('sinkhorn', 'fwd', case, 9.0, 0.1) == ('<= 8 us', 'missed')


def test_without_a_gpu_it_says_what_to_do():
    env = os.environ | {'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(BENCH.parents[1])}
    result = subprocess.run(
        [sys.executable, BENCH / 'bench.py'], env=env, capture_output=True, text=True
    )
    assert result.returncode == 2 and '--device cpu' in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


class Broken(bench_ours.Torch):
    name = 'broken'

    def pre(self, x, h_pre):
        raise RuntimeError('no such kernel\nand a long story')


class Wrong(bench_ours.Torch):
    name = 'wrong'

    def pre(self, x, h_pre):
        return super().pre(x, h_pre.flip(-1))


class Choosy(Contender):
    name = 'choosy'
    without = ('post',)

    def unsupported(self):
        return 'only 4 streams'


def measured(kind: type[Contender], op: str) -> list[bench_measure.Row]:
    return bench_measure.measure(CASE, kind, op, bench_timer.CpuTimer(), 'cpu', 1e9)


def test_a_failing_peer_is_a_row():
    (row,) = measured(Broken, 'sublayer')
    assert row.status == 'failed: RuntimeError: no such kernel'
    assert [row.status for row in measured(Broken, 'post')] == ['ok', 'ok']
    (row,) = measured(Choosy, 'pre')
    assert row.status == 'skipped: only 4 streams'
    assert measured(Choosy, 'post') == []
    assert availability(Raising) == (False, 'OSError: half installed')


class Raising(Contender):
    @classmethod
    def available(cls):
        raise OSError('half installed')


def test_wrong_semantics_show_in_the_errors():
    assert all(row.error_fwd > 0.1 for row in measured(Wrong, 'pre'))


def test_rows_first_is_another_function_and_its_reference_knows():
    class RowsFirst(bench_ours.Torch):
        name, rows_first = 'rows-first', True

        def sinkhorn(self, logits):
            return super().sinkhorn(logits.transpose(-1, -2)).transpose(-1, -2)

        def mapping(self, x, *params):
            weight, bias, alpha = params
            weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
            *gates, h_res = super().mapping(x, weight, bias, alpha)
            return *gates, h_res.transpose(-1, -2)

    case = Case(hidden=32, tokens=8, streams=4, dtype='fp32', iterations=1)
    for op in ('sinkhorn', 'sublayer'):
        assert max(bench_measure.accuracy(RowsFirst, case, op, 'cpu')[:2]) < 1e-5
        assert max(bench_measure.accuracy(not_said(RowsFirst), case, op, 'cpu')[:2]) > 1e-3


def not_said(kind: type[Contender]) -> type[Contender]:
    return type('NotSaid', (kind,), {'rows_first': False})


def test_the_budget_is_kept_and_what_is_left_is_listed(tmp_path):
    options = bench.parse([*TINY, '--output', str(tmp_path)])
    bench_run.run(options, tmp_path, [], deadline=0)
    rows = rows_of(tmp_path)
    assert len(rows) == len(bench_calls.OPS)
    assert {row['status'] for row in rows} == {'not run: the budget was spent'}
    assert '7 of 7 measurements were not run' in (tmp_path / bench_report.MARKDOWN).read_text()


def test_the_most_telling_measurements_come_first():
    cases = all_cases([64, 128], [2048, 8192], [2, 4], 'bf16')
    items = bench_run.schedule(cases, list(bench_ours.OURS), list(bench_calls.OPS))
    first = [case for case, _, _ in items[:12]]
    assert all(case.headline for case in first) and items[0][2] == 'sublayer'
    assert items[0][1] is bench_ours.Triton and items[-1][1] is bench_ours.Compiled
    assert len(set(items)) == len(items)


def test_names_of_the_command_line_are_those_of_the_registries():
    assert bench.OPS == bench_calls.OPS
    assert bench.OURS == tuple(kind.name for kind in bench_ours.OURS)
    assert bench.PEERS == tuple(kind.name for kind in bench_peers.PEERS)
    assert all(kind.__doc__ for kind in bench_peers.PEERS)


def test_profile_prints_shares(tmp_path, capsys):
    trace = tmp_path / 'trace.json'
    arguments = ['--device', 'cpu', '--steps', '1', '--rows', '3', '--output', str(trace)]
    assert profile_layer.main(arguments) == 0
    shown = capsys.readouterr().out
    assert 'share' in shown and 'others' in shown and trace.stat().st_size


class Event:
    clock = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        Event.clock += 1e-8
        self.at = Event.clock

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Graph:
    def replay(self):
        Event.clock += 8e-6

    def reset(self):
        pass


@pytest.fixture
def pretended(monkeypatch) -> bench_timer.CudaTimer:
    """The timer of a GPU on a pretended device, where a replay takes 8 us."""
    for name, value in {
        'Stream': object,
        'stream': contextlib.nullcontext,
        'synchronize': lambda: None,
        'empty_cache': lambda: None,
        'Event': Event,
        'CUDAGraph': Graph,
        'graph': lambda graph, stream: contextlib.nullcontext(),
        'get_device_properties': lambda index: SimpleNamespace(L2_cache_size=60 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    return bench_timer.CudaTimer(seconds=1e-7)


def test_the_gpu_timer_divides_a_graph_by_its_calls(pretended):
    def call():
        Event.clock += 2e-6

    for mode in pretended.modes:
        assert pretended.measure(mode, [call] * 4).median == pytest.approx(2e-6, rel=0.01)
    assert pretended.copies(1 << 40) == 2 and pretended.copies(1) == bench_timer.MOST_COPIES
    assert pretended.copies(10 << 20) * 10 > 2 * 60


def test_single_ops_are_timed_eagerly_only_where_they_cannot_be_captured(pretended, monkeypatch):
    monkeypatch.setattr(pretended, 'copies', lambda size: 2)

    def modes(op: str) -> list[tuple[str, str, str]]:
        found = bench_measure.measure(CASE, bench_ours.Torch, op, pretended, 'cpu', 1e9)
        return [(row.direction, row.mode, row.status[:6]) for row in found]

    both = ['graph', 'eager']
    assert modes('layer') == [(w, m, 'ok') for w in ('fwd', 'bwd', 'fwd+bwd') for m in both]
    assert modes('pre') == [('fwd', 'graph', 'ok'), ('bwd', 'graph', 'ok')]

    def refuse(graph, stream):
        raise RuntimeError('cannot be captured')

    monkeypatch.setattr(torch.cuda, 'graph', refuse)
    expected = [(w, *m) for w in ('fwd', 'bwd') for m in (('graph', 'failed'), ('eager', 'ok'))]
    assert modes('pre') == expected
