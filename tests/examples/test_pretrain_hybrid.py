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

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'pretrain_hybrid.py'
MODEL = (
    '--hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 '
    '--micro-batch-size 1 --global-batch-size 4 --mock-data --tokenizer-type NullTokenizer '
    '--vocab-size 255 --lr 1e-2 --min-lr 1e-3 --train-iters 4 --eval-iters 0 --eval-interval 1000 '
    '--log-interval 1 --split 98,1,1 --num-workers 0 --untie-embeddings-and-output-weights '
    '--hidden-dropout 0 --attention-dropout 0 --position-embedding-type rope --swiglu '
    '--mamba-state-dim 8 --mamba-head-dim 8 --mamba-num-groups 2 --linear-key-head-dim 8 '
    '--linear-value-head-dim 8 --linear-num-key-heads 2 --linear-num-value-heads 4'
).split()
MHC = '--residual-type mhc --mhc-init identity'.split()
MEMORY = '--engram-layers 1 2 --engram-heads 2 --engram-table-size 300 --engram-dim 16'.split()
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)')


def train(world: int, pattern: str, *flags: object) -> dict[int, tuple[str, str]]:
    """Iteration -> loss and gradient norm, as they are printed."""
    words = ('--hybrid-layer-pattern', pattern, *map(str, flags))
    done = launch(world, '-m', 'megatron_mhc.run', SCRIPT, *MODEL, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {int(i): (loss, norm) for i, loss, norm in LINE.findall(done.stdout)}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Four iterations on two stages of unequal length, saved after two, and monitored.

    The second stage has a prediction layer of two layers, the first a memory.
    """
    folder = tmp_path_factory.mktemp('unbroken')
    curve = train(
        *(2, '*-M|-G-/*-', '--pipeline-model-parallel-size', 2),
        *(*MHC, *MEMORY, '--save', folder / 'saved', '--save-interval', 2),
        *('--mhc-monitor', '--mhc-monitor-interval', 1, '--tensorboard-dir', folder / 'events'),
    )
    return folder, curve


def test_a_run_resumes_on_other_stages_as_if_unbroken(unbroken, tmp_path, tensors):
    """Weights and optimizer states, but for a gradient norm that is summed in another order."""
    folder, curve = unbroken
    flags = ('--load', folder / 'saved', '--ckpt-step', 2, '--save', tmp_path, '--save-interval', 2)
    resumed = train(1, '*-M-G-/*-', *MHC, *MEMORY, *flags)
    assert sorted(resumed) == [3, 4] and resumed[3] == curve[3]
    wanted, states = (tensors(f / 'iter_0000004') for f in (folder / 'saved', tmp_path))
    assert states.keys() == wanted.keys()
    assert 'optimizer.state.exp_avg.decoder.layers.5.mlp_hyper_connection.alpha_res' in states
    prediction = 'optimizer.state.exp_avg.mtp.layers.0.mtp_model_layer.layers.1.'
    assert any(key.startswith(prediction) for key in states)
    assert 'optimizer.state.exp_avg.decoder.engram.layer_2.table.weight' in states
    assert not any('mtp.' in key and 'hyper_connection' in key for key in states)
    for key, value in wanted.items():
        torch.testing.assert_close(states[key], value, rtol=1e-4, atol=1e-6, msg=key)


V = (
    *('--pipeline-model-parallel-size', 2, '--pipeline-schedule', 'dualpipev-w'),
    *('--mhc-post-stream', 'high', '--pipeline-verify-steps', 1),
)


def test_a_run_goes_on_under_a_v_and_back(tmp_path, tensors):
    """One more iteration under either, and the monitors' record of the first.

    The last rank has two copies of the word embedding: of the prediction layer and the first stage.
    """
    before, after, events = tmp_path / 'before', tmp_path / 'after', tmp_path / 'events'
    curve = train(1, '*-M-G-/*-', *MHC, '--save', before, '--save-interval', 2)
    saves = (*MHC, '--save', after, '--save-interval', 1)
    on_v = train(
        *(2, '*|-M|-|G-/*-', *V, *saves, '--load', before, '--ckpt-step', 2),
        *('--exit-interval', 3, '--mhc-monitor', '--mhc-monitor-interval', 1),
        *('--tensorboard-dir', events),
    )
    assert on_v == {3: curve[3]}
    assert present(read_run(events, 'run')) == ROWS
    back = train(1, '*-M-G-/*-', '--load', after, *saves)
    assert sorted(back) == [4]
    wanted, states = (tensors(folder / 'iter_0000004') for folder in (before, after))
    assert states.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(states[key], value, rtol=1e-4, atol=1e-6, msg=key)


# Two rows a layer, of which each has one: attention in the first, its MLP in the second.
ROWS = [0, 3, 4, 7, 8, 11]


def test_monitors_have_a_row_for_each_layer(unbroken):
    run = read_run(unbroken[0] / 'events', 'run')
    assert present(run) == ROWS
    assert not [finding for finding in verdict(run) if finding.level == 'sick']
    assert chosen_sublayers(run, None, []) == [0, 7, 11]
    with pytest.raises(ValueError, match='--sublayers 1: run has no layer 1 mlp'):
        chosen_sublayers(run, [1], [])
    assert run.pattern == '*-M|-G-/*-'


def test_dense_connections_train(tmp_path, tensors):
    dense = ('--residual-type', 'mudd', '--save', tmp_path, '--save-interval', 4)
    curve = train(1, '*-*--*', *dense)
    losses = [float(loss) for loss, _ in curve.values()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    # Blocks *-, *-- and *: four ways over 2 and 3 outputs, and the residual way over all 4.
    saved = tensors(tmp_path / 'iter_0000004')
    biases = [saved[f'decoder.dense_aggregates.{block}.bias'] for block in range(3)]
    assert [len(bias) for bias in biases] == [4 * 2, 4 * 3, 4]
    assert not torch.equal(biases[1], biases[1].round())


SPARSE = (
    '--multi-latent-attention --kv-lora-rank 16 --q-lora-rank 16 --qk-head-dim 8 '
    '--qk-pos-emb-head-dim 4 --v-head-dim 8 --rope-type rope --dsa-indexer-n-heads 2 '
    '--dsa-indexer-head-dim 8 --dsa-indexer-topk 8 --dsa-indexer-loss-coeff 0.1 '
    '--experimental-attention-variant dsa --disable-bias-linear'
).split()


def test_sparse_attention_trains(tmp_path, tensors):
    curve = train(1, 'D-M-', *MHC, *SPARSE, '--save', tmp_path, '--save-interval', 4)
    losses = [float(loss) for loss, _ in curve.values()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    saved = tensors(tmp_path / 'iter_0000004')
    # Queries and keys of the indexer, which learns by a loss of its own.
    moment = 'optimizer.state.exp_avg.decoder.layers.0.self_attention.core_attention.indexer'
    assert all(saved[f'{moment}.{name}.weight'].any() for name in ('linear_wq_b', 'linear_wk'))
