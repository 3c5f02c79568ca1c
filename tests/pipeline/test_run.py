"""Schedules run from plans in Megatron's own loop, from the command line."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
from launch import launch

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'pretrain_gpt.py'
MODEL = (
    '--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
    '--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --min-lr 1e-3 --train-iters 6 '
    '--lr-decay-style cosine --weight-decay 0.1 --eval-iters 1 '
    '--log-interval 1 --split 98,1,1 --num-workers 0 --hidden-dropout 0 --attention-dropout 0 '
    '--pipeline-model-parallel-size 2 --residual-type mhc --mhc-init identity --no-load-rng '
)
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)')
VALIDATION = re.compile(r'validation loss at iteration \d+ on (\w+) set \| lm loss value: (\S+)')


def run(world: int, flags: str) -> subprocess.CompletedProcess:
    model = MODEL
    if '--train-samples' in flags:
        # Which Megatron takes in place of iterations, and the batch size from its schedule.
        model = model.replace('--train-iters 6 ', '').replace('--global-batch-size 4 ', '')
    words = [word.replace('_', ' ') if ':' in word else word for word in (model + flags).split()]
    return launch(world, '-m', 'megatron_mhc.run', SCRIPT, *words)


def train(flags: str, world: int = 2) -> dict:
    """iteration -> (loss, gradient norm), and set -> its final loss."""
    done = run(world, flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = {int(i): (loss, norm) for i, loss, norm in LINE.findall(done.stdout)}
    return lines | dict(VALIDATION.findall(done.stdout))


@pytest.fixture(scope='module')
def stock(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp('stock')
    return folder, train(f'--pipeline-schedule 1f1b --save {folder} --save-interval 3')


def test_curve_and_checkpoints_of_1f1b(stock, tmp_path):
    """Resumed from a checkpoint of 1F1B the run is 1F1B's, and its own checkpoint resumes there.

    The embedding is tied: both copies of its weight are on the last rank.
    """
    folder, wanted = stock
    ours = train(
        f'--pipeline-schedule dualpipev-w --mhc-post-stream high --mhc-recompute-layer-num stage '
        f'--load {folder} --ckpt-step 3 --save {tmp_path} --save-interval 5'
    )
    # Megatron averages the first two losses that a resumed run logs.
    assert (ours[4], ours[6]) == (wanted[4], wanted[6])
    assert ours[5][1] == wanted[5][1]
    assert (ours['validation'], ours['test']) == (wanted['validation'], wanted['test'])
    back = train(f'--pipeline-schedule 1f1b --load {tmp_path} --ckpt-step 5')
    assert back[6] == wanted[6] and back['test'] == wanted['test']


def test_two_copies_are_two_replicas(stock, tmp_path):
    """The curve of 1F1B with twice the data-parallel ranks; each stage is written once.

    Both ends hold two copies of the tied embedding, of different copies of the model.
    """
    folder, _ = stock
    resumed = f'--load {folder} --ckpt-step 3 '
    wanted = train(f'--pipeline-schedule 1f1b {resumed}', world=4)
    ours = train(f'--pipeline-schedule dualpipe {resumed} --save {tmp_path} --save-interval 5')
    assert ours.keys() == wanted.keys() and (ours[4], ours[6]) == (wanted[4], wanted[6])
    assert ours[5][1] == wanted[5][1]
    assert (ours['validation'], ours['test']) == (wanted['validation'], wanted['test'])
    back = train(f'--pipeline-schedule 1f1b --load {tmp_path} --ckpt-step 5', world=4)
    assert back[6] == wanted[6] and back['test'] == wanted['test']


def test_replicas_from_scratch_with_a_distributed_optimizer():
    """With all that overlaps, bf16, a batch size that ramps up and an iteration that is skipped.

    The first steps run twice, to compare their bits. Initial weights are those of 1F1B.
    """
    flags = (
        '--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16 '
        '--train-samples 40 --step-batch-size-schedule 0:4_256:8 '
        '--iterations-to-skip 4 '
    )
    ours = train(flags + '--pipeline-schedule v-min --pipeline-verify-steps 2', world=4)
    stock_run = train(flags + '--pipeline-schedule 1f1b', world=4)
    assert ours.keys() == stock_run.keys() == {1, 2, 3, 5, 6, 'validation', 'test'}
    for key in (1, 2, 3, 5, 6):
        for mine, theirs in zip(ours[key], stock_run[key], strict=True):
            # bf16 gradients of tied weights are summed in another order.
            assert float(mine) == pytest.approx(float(theirs), rel=2e-3)


def test_a_refusal_comes_before_anything_is_built():
    done = run(1, '--pipeline-schedule dualpipev --global-batch-size 3')
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if 'error: ' in line)
    assert 'dualpipev needs at least 2 x pp = 4 microbatches' in line
    assert 'building GPT' not in done.stdout
