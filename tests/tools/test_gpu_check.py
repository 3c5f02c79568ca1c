"""The script for a GPU: what its steps read and write; CI rehearses the script itself."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BENCH = ROOT / 'tools' / 'bench'
sys.path[:0] = [str(BENCH), str(ROOT / 'tools')]

import kernel_table  # noqa: E402
import kernel_times  # noqa: E402
import train_check  # noqa: E402

STEP = """
 [2026-12-01 10:00:00] iteration        {i}/      20 | consumed samples: 8 | elapsed time per \
iteration (ms): {ms} | learning rate: 1.0E-04 | global batch size: 8 | lm loss: {loss} | loss \
scale: 1.0 | grad norm: 1.5 | number of skipped iterations: 0 | number of nan iterations: 0 |
"""
MEMORY = '[Rank 0] (after 1 iterations) memory (MB) | allocated: 10.5 | max allocated: {mb} | x: 1'


def script(folder: pathlib.Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """The script with a Python that says what it is asked, and fails at ``FAILS``."""
    python = folder / 'python'
    python.write_text('#!/bin/sh\ncase "$*" in *"$FAILS"*) exit 1;; esac\necho asked "$@"\n')
    python.chmod(0o755)
    return subprocess.run(
        [BENCH / 'gpu_check.sh', *words],
        env={**os.environ, 'PYTHON': str(python), 'FAILS': 'nothing', **environment},
        capture_output=True,
        text=True,
    )


def test_it_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / 'out'
    first = script(tmp_path, '--rehearse', str(out), FAILS='graph_check')
    assert first.returncode == 1 and 'failed: graphs (exit status 1)' in first.stdout
    done = {path.name for path in (out / '.done').iterdir()}
    assert {'environment', 'kernels', 'bench', 'train', 'bench-small', 'memcheck'} <= done
    assert {'post-stream', 'overlap', 'tests', 'racecheck', 'profile'} <= done
    assert 'graphs' not in done and 'asked tools/bench/bench.py' in (out / 'bench.txt').read_text()
    second = script(tmp_path, '--rehearse', str(out))
    assert second.returncode == 0 and 'all passed' in second.stdout, second.stdout
    assert second.stdout.count('done before') == len(done) and 'graphs' in second.stdout
    nothing = script(tmp_path, str(tmp_path / 'late'), MINUTES='0')
    assert nothing.returncode == 3 and 'left: environment accuracy-bf16' in nothing.stdout
    wrong = script(tmp_path, '--rehears')
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize('run', train_check.RUNS)
def test_megatron_takes_the_flags_of_every_run(parse, run, tmp_path):
    options = train_check.parse(['--output', str(tmp_path)])
    args = parse(*train_check.flags(options, run, engine=False))
    assert (args.residual_type == 'mhc') == (not run.startswith('standard'))
    assert (args.fp8 == 'hybrid') == ('fp8' in run) and args.train_iters == 20
    assert args.profile == run.startswith('post-')


def test_a_run_is_read_from_its_log_and_stands_beside_the_standard_one(tmp_path):
    def log(ms: float, mb: float) -> str:
        steps = [STEP.format(i=1, ms=9 * ms, loss='3.5E+00')]
        steps += [STEP.format(i=i, ms=ms, loss='2.5E+00') for i in (2, 3, 4)]
        return ''.join(steps) + MEMORY.format(mb=mb)

    rows = {
        'standard-bf16': train_check.read(log(100.0, 1000.0)),
        'mhc-bf16': train_check.read(log(107.0, 1500.0)),
        'mhc-fp8': {'status': 'left out'},
    }
    assert rows['mhc-bf16'] == {
        **{'status': 'ok', 'iterations': 4, 'step_ms': 107.0, 'loss': 2.5, 'memory_mb': 1500.0}
    }
    text = train_check.table(rows, {'device': 'H200'})
    assert '| mhc-bf16 | 107.0 | 1.070 | 1500.0 | 1.500 | 2.5000 | ok |' in text
    assert '| mhc-fp8 | - | - | - | - | - | left out |' in text and '| device | H200 |' in text
    assert train_check.read('nothing')['status'].startswith('failed')


def test_gpus_have_the_names_of_the_model():
    assert kernel_times.known_gpu('NVIDIA H200') == 'h200'
    assert kernel_times.known_gpu('NVIDIA A100-SXM4-80GB') == 'a100'
    assert kernel_times.known_gpu('NVIDIA GH200 480GB') == 'NVIDIA GH200 480GB'


RECORD = json.loads(kernel_table.RECORD.read_text())


def test_the_pages_have_the_table_of_the_record():
    """Otherwise: python tools/kernel_table.py --pages."""
    for path, text in kernel_table.pages(RECORD).items():
        assert path.read_text() == text, path
    assert {'ours', 'te'} <= RECORD['rows'].keys()


def test_measured_sublayers_come_beside(tmp_path):
    (tmp_path / 'run' / 'bench').mkdir(parents=True)
    facts = {'device': 'NVIDIA H200', 'date': '2026-12-01 10:00 UTC'}
    (tmp_path / 'run' / 'bench' / 'environment.json').write_text(json.dumps(facts))
    rows = ['op,direction,mode,contender,hidden,tokens,streams,dtype,status,median_us']
    rows += [
        f'layer,fwd+bwd,graph,{who},{c},8192,4,bf16,ok,{us}'
        for who, c, us in (('triton', 4096, 800.4), ('te', 4096, 2000), ('liger', 2560, 9))
    ]
    (tmp_path / 'run' / 'bench' / 'results.csv').write_text('\n'.join(rows))
    seen = kernel_table.measured(RECORD, tmp_path)
    assert seen == {'ours': (800.4, facts['date']), 'te': (2000.0, facts['date'])}
    text = kernel_table.table(RECORD, seen)
    assert '800 (2026-12-01)' in text and '2000 (2026-12-01)' in text
    assert 'nothing yet' in kernel_table.table(RECORD, {})
    assert kernel_table.measured(RECORD | {'gpu': 'h100'}, tmp_path) == {}
    with pytest.raises(ValueError, match='have to stand there once'):
        kernel_table.page('no marks', '')
