"""Launch scripts: what they start, with which environment, under torchrun and Slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def command(answer):
    return lambda words: answer(f'study {words}')


def played(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose programs are shell scripts."""
    for name, body in programs.items():
        (folder / name).write_text(f'#!/bin/sh\n{body}\n')
        (folder / name).chmod(0o755)
    return {'PATH': f'{folder}:{os.environ["PATH"]}'}


SHOW = 'printf "%s\\n" "$CUDA_DEVICE_MAX_CONNECTIONS" "$@"'


@pytest.mark.parametrize(
    'machine, tp, connections', [('h100', 1, '32'), ('h100', 2, '1'), ('b200', 2, '32')]
)
def test_a_script_starts_the_best_layout_of_its_gpus(command, tmp_path, machine, tp, connections):
    folder, tools = tmp_path / 'scripts', tmp_path / 'tools'
    tools.mkdir()
    line = f'27b --gpus 16 64 --tp {tp} --pp 2 4 --ep 4 8 --hardware {machine}'
    found = json.loads(command(f'{line} --json --launch-scripts {folder}')[1])
    best = [row for row in found['scaling'] if (row['scaling'], row['curve']) == ('strong', 'best')]
    names = [f'gpus-{row["gpus"]}-n4.{kind}' for row in best for kind in ('sh', 'slurm')]
    assert best and sorted(path.name for path in folder.iterdir()) == sorted(names)
    for row in best:
        script = folder / f'gpus-{row["gpus"]}-n4.sh'
        done = subprocess.run(
            [script, '--exit-interval', '7'],
            env=played(tools, python=SHOW)
            | {'MASTER_ADDR': 'node-1', 'PRETRAIN': 'my pretrain.py'},
            capture_output=True,
            text=True,
            check=True,
        )
        set_to, *seen = done.stdout.splitlines()
        assert set_to == connections == ('1' if row['one_queue'] else '32')
        assert seen[-2:] == ['--exit-interval', '7'] and 'my pretrain.py' in seen
        flags = dict(zip(seen, seen[1:], strict=False))
        ranks = int(flags['--nproc-per-node']) * int(flags.get('--nnodes', 1))
        assert ranks == row['gpus'] and '--mock-data' in seen
        for name, flag in (
            ('tp', 'tensor-model'),
            ('pp', 'pipeline-model'),
            ('ep', 'expert-model'),
        ):
            assert flags[f'--{flag}-parallel-size'] == str(row[name])
        assert flags['--global-batch-size'] == '1280' and flags['--eval-interval'] == '1000'
        assert ('--mhc-post-stream' in seen) == (connections == '32' and row['pp'] > 1)


def test_scripts_follow_the_batch_and_keep_the_tokens(command, tmp_path):
    line = '27b --gpus 64 128 --tp 1 --pp 4 --ep 8 --schedule 1f1b --scaling weak'
    command(f'{line} --launch-scripts {tmp_path}')
    text = (tmp_path / 'gpus-128-n4.sh').read_text()
    words = shlex.split(text, comments=True)
    flags = dict(zip(words, words[1:], strict=False))
    assert flags['--global-batch-size'] == '2560'
    # 50,000 steps of 1280 with 2000 of warm-up.
    assert (flags['--train-iters'], flags['--lr-warmup-iters']) == ('25000', '1000')


def test_slurm_runs_the_script_once_on_each_node(command, tmp_path):
    folder, tools = tmp_path / 'scripts', tmp_path / 'tools'
    tools.mkdir()
    command(f'27b --gpus 64 --tp 1 --pp 4 --schedule 1f1b --launch-scripts {folder}')
    text = (folder / 'gpus-64-n4.slurm').read_text()
    assert '#SBATCH --nodes=8\n' in text and '#SBATCH --gpus-per-node=8\n' in text
    env = played(
        tools,
        scontrol='printf "node-7\\nnode-8\\n"',
        srun='shift; exec "$@"',
        python='printf "%s\\n" "$MASTER_PORT" "$@"',
    )
    job = {'SLURM_JOB_NODELIST': 'node-[7-8]', 'SLURM_JOB_ID': '123456'}
    done = subprocess.run(
        ['bash', folder / 'gpus-64-n4.slurm', '--seed', '5 6'],
        env=env | job | {'SLURM_SUBMIT_DIR': str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = done.stdout.splitlines()
    assert seen[0] == '23456' and 'node-7:23456' in seen and '123456' in seen
    assert seen[-2:] == ['--seed', '5 6']
