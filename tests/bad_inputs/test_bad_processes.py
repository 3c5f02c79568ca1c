"""A few bad lines through real processes: what a shell, and torchrun, show at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from one_line import check_refusal

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


def start(line: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *line.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT | environment,
    )


@pytest.mark.parametrize(
    ('line', 'names'),
    [
        ('-m megatron_mhc bogus', ('COMMAND', 'bogus')),
        ('-m megatron_mhc schedule list extra', ('extra',)),
        ('-m megatron_mhc run --device tpu x.py', ('--device', 'tpu')),
        ('-m megatron_mhc.run no_such_script.py', ('SCRIPT', 'no_such_script.py')),
        ('tools/quickstart.py train --iters 0', ('--iters', '0')),
        ('tools/plot_losses.py --output x.png a', ('NAME=TENSORBOARD_DIR', 'a')),
        ('examples/recipe.py 3b --gpus-per-node 0', ('--gpus-per-node', '0')),
    ],
)
def test_one_line_and_nothing_else(line, names):
    done = start(line)
    check_refusal(done.returncode, done.stdout, done.stderr, names)
    assert done.stderr.count('\n') == 1 and not done.stdout


def test_another_launchers_variable_is_named():
    done = start('-m megatron_mhc.run examples/pretrain_gpt.py', SLURM_NTASKS='two')
    check_refusal(done.returncode, done.stdout, done.stderr, ('SLURM_NTASKS', 'two'))


def test_torchrun_repeats_the_line_at_the_end_of_its_report():
    done = start(
        '-m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_mhc.run --device cpu '
        'no_such_script.py'
    )
    line = 'error: SCRIPT no_such_script.py: no such file'
    assert done.returncode and done.stderr.count(line) == 2
    # Below it stands the rule that ends the report, and nothing else.
    assert line in done.stderr.splitlines()[-2] and set(done.stderr.splitlines()[-1]) == {'='}
