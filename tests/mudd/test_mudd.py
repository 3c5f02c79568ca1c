"""``--residual-type mudd`` from the command line: refusals, resume, training."""

from __future__ import annotations

import pathlib
import re

import pytest
from launch import launch

from megatron_mhc import ResidualConfig
from megatron_mhc.settings.flags_residual import same_structure

SCRIPT = pathlib.Path(__file__).parents[2] / 'examples' / 'pretrain_gpt.py'

LOCAL = '--residual-type mudd --transformer-impl local '


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ('--pipeline-model-parallel-size 2', 'every stage would have to send'),
        ('--recompute-granularity full', '--recompute-granularity selective'),
        ('--recompute-granularity selective --recompute-modules layernorm', 'three inputs'),
        ('--multi-latent-attention', 'one latent'),
        ('--mtp-num-layers 1', 'final norm'),
        ('--hybrid-layer-pattern *-/*-', 'final norm'),
        ('--hybrid-layer-pattern D-', 'one latent'),
        ('--mhc-post-stream high', '--mhc-post-stream high'),
        ('--mhc-monitor', 'no H_res to monitor'),
        ('--mhc-num-residual-streams 4', 'has no effect with --residual-type mudd'),
        ('--mhc-recompute-layer-num auto', 'has no effect with --residual-type mudd'),
        ('--group-query-attention --num-query-groups 1 --tensor-model-parallel-size 2', 'group'),
    ],
)
def test_refused_in_one_line(refused, flags, said):
    assert said in refused(LOCAL + flags)


def test_transformer_engine_is_refused(refused):
    line = refused('--residual-type mudd --transformer-impl transformer_engine')
    assert 'add --transformer-impl local' in line


def test_flags_of_mudd_belong_to_it(parse, refused):
    assert parse(*LOCAL.split()).mudd_variant == 'dynamic'
    assert '--mudd-variant' in refused('--residual-type mhc --mudd-variant static')


def test_another_topology_is_another_structure():
    kinds = [ResidualConfig('mudd', mudd_variant=name) for name in ('dynamic', 'static')]
    kinds += [ResidualConfig(name) for name in ('standard', 'hc', 'mhc')]
    for one in kinds:
        assert [same_structure(one, other) for other in kinds] == [one is other for other in kinds]


def test_trains_saves_and_resumes_on_another_layout(tmp_path):
    """Loss falls; three iterations of two ranks from a checkpoint of one."""
    flags = (
        '--num-layers 3 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
        '--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --mock-data '
        '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --lr-decay-style constant '
        '--eval-iters 0 --eval-interval 9 --log-interval 1 --split 98,1,1 --num-workers 0 '
        '--hidden-dropout 0 --attention-dropout 0 --residual-type mudd --swiglu '
        f'--disable-bias-linear --normalization RMSNorm --save {tmp_path} --save-interval 3 '
        '--override-opt-param-scheduler'
    ).split()

    def train(ranks, *more):
        done = launch(ranks, '-m', 'megatron_mhc.run', SCRIPT, *flags, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return [float(loss) for loss in re.findall(r'lm loss: (\S+)', done.stdout)]

    first = train(1, '--train-iters', '6')
    assert len(first) == 6 and first[-1] < first[0]
    again = ('--train-iters', '6', '--load', str(tmp_path), '--ckpt-step', '3')
    resumed = train(2, *again, '--tensor-model-parallel-size', '2', '--sequence-parallel')
    # Megatron averages the first two losses that it logs.
    assert resumed[2] == pytest.approx(first[5], rel=1e-5)
