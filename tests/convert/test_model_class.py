"""A run of a GPT model goes on as one of a hybrid model, and back, with no bit changed."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from launch import Running, start

from megatron_mhc.convert.model_class import move
from megatron_mhc.convert.source import open_source

ROOT = pathlib.Path(__file__).parents[2]
# Gradients are not clipped: their norm is a sum in the order of parameters, which differs.
RUN = """
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4
    --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --min-lr 1e-3
    --train-iters 5 --eval-iters 0 --eval-interval 1000 --log-interval 1 --split 98,1,1
    --num-workers 0 --clip-grad 0 --save-interval 2 --residual-type mhc --mhc-init identity
    --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
""".split()
SMALL = '--hidden-size 32 --num-attention-heads 4 --position-embedding-type rope'.split()
STAGES = '--pipeline-model-parallel-size 2'.split()
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)')
# Tied embeddings, biases, dropout, two virtual stages on each of two ranks, states kept apart.
DENSE = [*SMALL, *'--num-layers 4 --use-distributed-optimizer --mhc-stream-merge learned'.split()]
# bf16 with fp32 weights in the optimizer, a dense layer, then one of experts.
EXPERTS = [
    *SMALL,
    *"""
    --num-layers 2 --num-experts 4 --moe-layer-freq ([0]+[1]) --moe-router-topk 2
    --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16 --disable-bias-linear
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --swiglu
    --normalization RMSNorm --untie-embeddings-and-output-weights --hidden-dropout 0
    --attention-dropout 0 --bf16
    """.split(),
]
# Arguments of a run that was resumed, and what counting FLOPs makes of absent grouped queries.
OF_RESUMING = """
    load save iteration num_floating_point_operations_so_far use_checkpoint_args num_query_groups
""".split()
BOTH = ('dense', 'experts')
HYBRID = {'dense': '*-|*-|*-|*-', 'experts': '*-*E'}


def train(world: int, kind: str, *flags: object) -> Running:
    script = ROOT / 'examples' / f'pretrain_{kind}.py'
    return start(world, '-m', 'megatron_mhc.run', script, *RUN, *flags)


def curve(run: Running) -> dict[int, tuple[str, str]]:
    """Iteration -> loss and gradient norm, as they are printed."""
    done = run.result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {int(i): (loss, norm) for i, loss, norm in LINE.findall(done.stdout)}


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
    """Five iterations of each model, saved after two; their curves."""
    folder = tmp_path_factory.mktemp('gpt')
    virtual = (*STAGES, '--num-layers-per-virtual-pipeline-stage', 1)
    runs = {
        'dense': train(2, 'gpt', *DENSE, *virtual, '--save', folder / 'dense'),
        'experts': train(1, 'gpt', *EXPERTS, '--save', folder / 'experts'),
    }
    return folder, {name: curve(run) for name, run in runs.items()}


@pytest.fixture(scope='module')
def hybrid(gpt):
    """What they are as hybrid models after two iterations, with what the command tells."""
    folder, _ = gpt
    made = folder.parent / 'hybrid'
    made.mkdir()
    return made, {name: move(folder / name, made / name, 'hybrid', step=2) for name in BOTH}


def contents(path: pathlib.Path) -> dict:
    """Every tensor and every opaque state, of the model and of the run."""
    source = open_source(path)
    return {
        name: source.opaque(name).getvalue() if entry.shape is None else source.tensor(name)
        for name, entry in (source.entries | source.run).items()
        if not name.startswith('common_state')
    }


def assert_same(path: pathlib.Path, other: pathlib.Path, *unlike: str) -> None:
    """All that two checkpoints hold, but for arguments that are ``unlike``."""
    a, b = contents(path), contents(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = value == b[name] if isinstance(value, bytes) else torch.equal(value, b[name])
        assert same, name
    first, second = (open_source(where).state for where in (path, other))
    assert first.keys() == second.keys()
    for name in first.keys() - {'args'}:
        assert str(first[name]) == str(second[name]), name
    first, second = (vars(state['args']) for state in (first, second))
    assert {k for k in first.keys() | second.keys() if first.get(k) != second.get(k)} <= {*unlike}


@pytest.fixture(scope='module')
def resumed(gpt, hybrid):
    """The last three iterations as hybrid models; the dense one also on one rank."""
    made, _ = hybrid
    load = {name: ('--load', made / name, '--save', made / f'{name} on') for name in BOTH}
    dense = ('--use-checkpoint-args', *DENSE[6:])
    runs = {
        'dense': train(2, 'hybrid', *dense, *STAGES, *load['dense']),
        'experts': train(1, 'hybrid', *EXPERTS, '--use-checkpoint-args', *load['experts']),
    }
    return made, {name: curve(run) for name, run in runs.items()}


@pytest.mark.parametrize('name', BOTH)
def test_a_run_goes_on_as_if_unbroken(gpt, resumed, tmp_path, name):
    """Losses as they are printed; then every bit of what it saves, of what the GPT run saved."""
    folder, curves = gpt
    made, after = resumed
    # Megatron averages the first two losses that it prints after a start.
    assert sorted(after[name]) == [3, 4, 5]
    assert all(after[name][i] == curves[name][i] for i in (3, 5))
    move(folder / name, tmp_path / 'last', 'hybrid')
    assert_same(tmp_path / 'last', made / f'{name} on', *OF_RESUMING)


@pytest.mark.parametrize('name', BOTH)
def test_and_back(gpt, hybrid, tmp_path, name):
    made, reports = hybrid
    assert reports[name].pattern == HYBRID[name] and reports[name].iteration == 2
    assert reports[name].states > 2 * reports[name].weights - 5
    back = move(made / name, tmp_path / 'back', 'gpt', verify=True)
    assert back.verified['difference'] == 0 < back.verified['largest']
    assert_same(tmp_path / 'back', gpt[0] / name / 'iter_0000002')
