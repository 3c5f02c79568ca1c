"""A hybrid model in the real training loop, with a script that knows nothing of streams."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from launch import launch

from megatron_mhc.monitor.heat_maps import chosen_sublayers
from megatron_mhc.monitor.runs import present, read_run
from megatron_mhc.monitor.verdict import verdict
from megatron_mhc.patches.cpu_pattern import check_pattern

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'pretrain_hybrid.py'
MODEL = (
    '--hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 '
    '--micro-batch-size 1 --global-batch-size 4 --mock-data --tokenizer-type NullTokenizer '
    '--vocab-size 255 --lr 1e-2 --min-lr 1e-3 --train-iters 4 --eval-iters 0 --eval-interval 1000 '
    '--log-interval 1 --split 98,1,1 --num-workers 0 --untie-embeddings-and-output-weights '
    '--hidden-dropout 0 --attention-dropout 0 --residual-type mhc --mhc-init identity --swiglu '
    '--mamba-state-dim 8 --mamba-head-dim 8 --mamba-num-groups 2 --linear-key-head-dim 8 '
    '--linear-value-head-dim 8 --linear-num-key-heads 2 --linear-num-value-heads 4'
).split()
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)')


def train(world: int, pattern: str, *flags: object) -> dict[int, tuple[str, str]]:
    """Iteration -> loss and gradient norm, as they are printed."""
    words = ('--hybrid-layer-pattern', pattern, *map(str, flags))
    done = launch(world, '-m', 'megatron_mhc.run', SCRIPT, *MODEL, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {int(i): (loss, norm) for i, loss, norm in LINE.findall(done.stdout)}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Four iterations on two stages of unequal length, saved after two, and monitored."""
    folder = tmp_path_factory.mktemp('unbroken')
    curve = train(
        *(2, '*-M|-G-', '--pipeline-model-parallel-size', 2),
        *('--save', folder / 'saved', '--save-interval', 2),
        *('--mhc-monitor', '--mhc-monitor-interval', 1, '--tensorboard-dir', folder / 'events'),
    )
    return folder, curve


def test_a_run_resumes_on_other_stages_as_if_unbroken(unbroken, tmp_path, tensors):
    """Weights and optimizer states, but for a gradient norm that is summed in another order."""
    folder, curve = unbroken
    flags = ('--load', folder / 'saved', '--ckpt-step', 2, '--save', tmp_path, '--save-interval', 2)
    resumed = train(1, '*-M-G-', *flags)
    assert sorted(resumed) == [3, 4] and resumed[3] == curve[3]
    wanted, states = (tensors(f / 'iter_0000004') for f in (folder / 'saved', tmp_path))
    assert states.keys() == wanted.keys()
    assert 'optimizer.state.exp_avg.decoder.layers.5.mlp_hyper_connection.alpha_res' in states
    for key, value in wanted.items():
        torch.testing.assert_close(states[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_monitors_have_a_row_for_each_layer(unbroken):
    run = read_run(unbroken[0] / 'events', 'run')
    # Two rows a layer, of which each has one: attention in the first, its MLP in the second.
    assert present(run) == [0, 3, 4, 7, 8, 11]
    assert not [finding for finding in verdict(run) if finding.level == 'sick']
    assert chosen_sublayers(run, None, []) == [0, 7, 11]
    with pytest.raises(ValueError, match='--sublayers 1: run has no layer 1 mlp'):
        chosen_sublayers(run, [1], [])
    assert run.pattern == '*-M|-G-'


def test_prediction_layers_are_refused_on_the_cpu():
    with pytest.raises(
        ValueError, match=r'pattern \*-/\*-: not on the CPU device, prediction layers'
    ):
        check_pattern('*-/*-')


def test_what_the_cpu_cannot_run_is_one_line():
    words = ('--hybrid-layer-pattern', 'M-D-')
    done = launch(1, '-m', 'megatron_mhc.run', SCRIPT, *MODEL, *words)
    assert done.returncode == 2
    assert "error: --hybrid-layer-pattern M-D-: not on the CPU device, 'D' (sparse" in done.stderr
    assert 'Traceback' not in done.stderr
