"""Context parallelism in Megatron's own loop: n streams train as where one rank has all tokens."""

from __future__ import annotations

import os
import pathlib
import re

import pytest
from launch import launch

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
    '--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --train-iters 5 '
    '--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --optimizer sgd --sgd-momentum 0 --lr 0.1 '
    '--lr-decay-style constant --eval-iters 0 --log-interval 1 --split 98,1,1 --num-workers 0 '
    '--hidden-dropout 0 --attention-dropout 0 --disable-bias-linear --residual-type mhc '
    '--mhc-init identity --spec context_attention SPEC --no-load-rng --no-load-optim '
    '--untie-embeddings-and-output-weights '
)
LINE = re.compile(r'iteration +\d+/.*lm loss: (\S+) .*grad norm: (\S+)')


def train(world: int, flags: str) -> list[tuple[float, ...]]:
    path = os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)])
    script = ROOT / 'examples' / 'pretrain_gpt.py'
    words = (FLAGS + flags).split()
    done = launch(world, '-m', 'megatron_mhc.run', script, *words, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [tuple(map(float, found)) for found in LINE.findall(done.stdout)]


def test_a_shared_sequence_trains_as_a_whole_one(tmp_path, tensors):
    whole, start = tmp_path / 'whole', '--save-interval 2 '
    lines = train(1, f'{start} --save {whole}')
    assert len(lines) == 5
    before, after = (tensors(whole / f'iter_000000{i}') for i in (2, 5))
    resumed = f'--load {whole} --ckpt-step 2 --save-interval 9 --context-parallel-size 2 '
    cases = {'cp2': (2, ''), 'pp2-cp2': (4, '--pipeline-model-parallel-size 2 ')}
    cases['pp2-cp2'] = (4, cases['pp2-cp2'][1] + '--pipeline-schedule zb-v')
    for name, (world, flags) in cases.items():
        got = train(world, f'{resumed}{flags} --save {tmp_path / name}')
        # Megatron averages the first two losses that a resumed run logs.
        assert got[-1] == pytest.approx(lines[-1], rel=2e-6)
        saved = tensors(tmp_path / name / 'iter_0000005')
        moved = 0
        for key, value in after.items():
            if not key.startswith(('decoder', 'embedding', 'output')):
                continue
            change = (value - before[key]).norm()
            # Sums over tokens are split; plain descent shows the gradients of three steps.
            assert (saved[key] - value).norm() <= 1e-5 * change + 1e-7 * value.norm(), key
            moved += bool(change > 0) * ('hyper_connection' in key)
        assert moved
