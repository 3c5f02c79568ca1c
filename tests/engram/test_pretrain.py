"""The real training loop with a memory, through the launcher and an unchanged script."""

from __future__ import annotations

import math
import pathlib
import re

import pytest
from launch import launch

SCRIPT = pathlib.Path(__file__).parents[2] / 'examples' / 'pretrain_gpt.py'
MODEL = (
    '--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
    '--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --min-lr 1e-3 --train-iters 6 '
    '--lr-decay-style cosine --weight-decay 0.1 --eval-iters 1 --eval-interval 100 '
    '--log-interval 1 --split 98,1,1 --num-workers 0 --hidden-dropout 0 --attention-dropout 0 '
    '--engram-layers 1 2 --engram-heads 2 --engram-table-size 300 --engram-dim 16'
).split()
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) ')


def train(world: int, *flags: str) -> tuple[dict[int, float], str]:
    """Iteration -> loss, and all that was printed."""
    done = launch(world, '-m', 'megatron_mhc.run', SCRIPT, *MODEL, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {int(i): float(loss) for i, loss in LINE.findall(done.stdout)}, done.stdout


def test_tables_reshard_from_two_expert_parallel_ranks_to_four(tmp_path):
    """bf16 tables, their fp32 copies and Adam states: as if the two ranks had gone on.

    Not to one: Megatron then has one optimizer in the place of two, of what is shared and the rest.
    """
    shared = '--residual-type mhc --bf16 --num-experts 4 --disable-bias-linear'.split()
    shared += ['--use-distributed-optimizer', '--dist-ckpt-optim-fully-reshardable']
    two = ['--expert-model-parallel-size', '2', '--save', str(tmp_path), '--save-interval', '2']
    losses, printed = train(2, *shared, *two)
    assert 'token ids are not compressed, null-text has no texts' in printed
    four = ['--expert-model-parallel-size', '4', '--load', str(tmp_path), '--ckpt-step', '2']
    more, _ = train(4, *shared, *four)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and sorted(more) == [3, 4, 5, 6]
    assert losses[6] < losses[1] and all(map(math.isfinite, losses.values()))
    # Megatron prints the second iteration after a start averaged with the first.
    for i in (3, 5, 6):
        assert more[i] == pytest.approx(losses[i], rel=2e-4)


def test_standard_trains_on_two_stages():
    """With token ids in bf16 messages."""
    losses, printed = train(2, '--bf16', '--pipeline-model-parallel-size', '2', '--log-throughput')
    assert sorted(losses) == list(range(1, 7)) and losses[6] < losses[1]
    assert 'throughput per GPU' in printed
