"""``bench_step.py`` and ``graph_check.py``: two trainings side by side."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BENCH = ROOT / 'tools' / 'bench'
sys.path.append(str(BENCH))

import graph_check  # noqa: E402

LOG = """
 [2026-11-30 10:00:00] iteration        {i}/       9 | consumed samples: 4 | elapsed time per \
iteration (ms): {ms} | learning rate: 1.0E-03 | global batch size: 4 | lm loss: {loss} | loss \
scale: 1.0 | grad norm: 1.5 | number of skipped iterations: 0 | number of nan iterations: 0 |
"""


def log(ms: float, *losses: str) -> str:
    return ''.join(LOG.format(i=i, ms=ms, loss=loss) for i, loss in enumerate(losses, start=1))


def test_a_step_is_compared_on_the_cpu():
    words = '--hidden-size 16 --num-layers 1 --seq-length 4 --micro-batch-size 1 --samples 1'
    done = subprocess.run(
        [sys.executable, BENCH / 'bench_step.py', *words.split()],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = done.stdout.splitlines()[-1]
    assert line.startswith('C = 16, T = 4, 1 layers: standard ') and 'ratio ' in line


@pytest.mark.parametrize('residual', ['hc', 'mhc'])
def test_megatron_takes_the_flags_of_every_run(parse, residual):
    options = graph_check.parse(['--residual-type', residual])
    for graphs in graph_check.GRAPHS:
        args = parse(*graph_check.flags(options, graphs, engine=False))
        assert args.cuda_graph_impl == graphs and args.residual_type == residual
        assert bool(args.mhc_cuda_graphs) == (graphs != 'none')


def test_a_digit_apart_is_a_failure():
    losses = [f'1.00000{i}E+01' for i in range(6)]
    eager = graph_check.curve(log(20.0, *losses))
    assert eager[2] == (20.0, losses[1]) and len(eager) == 6
    same = graph_check.verdict('local', eager, graph_check.curve(log(10.0, *losses)))
    assert same == (True, 'local: same losses; 20.0 -> 10.0 ms an iteration')
    losses[4] = '1.000009E+01'
    for other in (log(10.0, *losses), log(10.0, *losses[:4])):
        ok, line = graph_check.verdict('local', eager, graph_check.curve(other))
        assert not ok and line.endswith('from iteration 5 on')
    assert not graph_check.verdict('local', {}, {})[0]


def test_without_a_gpu_it_ends_in_one_line(capsys):
    from torch import cuda

    from megatron_mhc.runtime import cpu_device

    if cuda.is_available() and not cpu_device.is_installed():
        pytest.skip('this machine has a GPU')
    with pytest.raises(SystemExit) as ended:
        graph_check.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        'graph_check.py: error: no CUDA GPU is visible to torch; run it where there is one\n'
    )
