"""The flags of ``--lr-decay-style step``, and the learning rates that a run prints."""

from __future__ import annotations

import argparse
import pathlib
import re

import pytest
import torch
from launch import launch

from megatron_mhc.settings.flags_lr import LrSteps

ROOT = pathlib.Path(__file__).parents[2]
STEP = ['--lr-decay-style', 'step']
PAPER = 'step 0.8:0.316 0.9:0.1'


def test_the_default_is_the_papers_and_nothing_else_is_patched(parse):
    from megatron_mhc.patches import engine

    assert parse('--lr-decay-style', 'cosine').lr_decay_style == 'cosine'
    assert 'lr-steps' not in engine.applied()
    args = parse(*STEP)
    assert args.lr_decay_style == PAPER == LrSteps().style
    assert (args.lr_step_milestones, args.lr_step_rates) == ([0.8, 0.9], [0.316, 0.1])
    assert set(engine.applied()) & {'lr-steps', 'gpt-model', 'param-groups'} == {'lr-steps'}


def test_one_or_many_steps(parse):
    flags = '--lr-step-milestones 0.25 0.5 1e-3 --lr-step-rates 2 0 0.5'.split()
    flags[1:4] = ['1e-3', '0.25', '0.5']
    assert parse(*STEP, *flags).lr_decay_style == 'step 0.001:2.0 0.25:0.0 0.5:0.5'
    one = ['--lr-step-milestones', '0.7', '--lr-step-rates', '0.1']
    assert parse(*STEP, *one).lr_decay_style == 'step 0.7:0.1'


S = '--lr-decay-style step'
REFUSED = {
    '--lr-step-milestones 0.8 0.9': '--lr-step-milestones has no effect with --lr-decay-style',
    '--lr-step-rates 0.5 --lr-decay-style cosine': '--lr-step-rates has no effect with '
    '--lr-decay-style cosine',
    f'{S} --lr-step-milestones 0.5': '0.5: 1 milestones for 2 rates',
    f'{S} --lr-step-rates 0.5 0.4 0.3': '2 milestones for 3 rates',
    f'{S} --lr-step-milestones 0.9 0.8': '0.9 0.8: wanted in ascending order',
    f'{S} --lr-step-milestones 0.9 0.9': 'wanted in ascending order, each once',
    f'{S} --lr-step-milestones 0 0.9': 'wanted numbers above 0 to 1',
    f'{S} --lr-step-milestones 0.8 1': '0.8 1.0: wanted in ascending order, each once and below 1',
    f'{S} --lr-step-milestones 0.8 90': 'wanted numbers above 0 to 1',
    f'{S} --lr-step-milestones 0.8 nan': 'nan: wanted a finite number',
    f'{S} --lr-step-rates 0.5 -0.1': '--lr-step-rates 0.5 -0.1: wanted numbers from 0 to 1e+09',
    f'{S} --lr-step-rates inf 0.1': 'inf: wanted a finite number',
    f'{S} --lr-step-rates half': 'argument --lr-step-rates: half: wanted a finite number',
    f'{S} --lr-step-milestones': 'argument --lr-step-milestones: expected at least one',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_refusals_are_one_line_and_name_the_flag(refused, flags):
    assert REFUSED[flags] in refused(flags)


def test_the_checkpoints_schedule_brings_the_patch_with_it(parse, tmp_path):
    """Megatron loads the style with the scheduler; it has to be one that it knows by then."""
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.lr_steps import LR_STEPS_PATCH

    (tmp_path / 'iter_0000010' / 'mp_rank_00').mkdir(parents=True)
    (tmp_path / 'latest_checkpointed_iteration.txt').write_text('10')
    saved = {'args': argparse.Namespace(lr_decay_style=PAPER), 'model': {}}
    torch.save(saved, tmp_path / 'iter_0000010' / 'mp_rank_00' / 'model_optim_rng.pt')
    flags = ['--load', str(tmp_path), '--use-checkpoint-opt_param-scheduler']
    for more, style in (([], PAPER), (['--finetune'], 'linear'), (['--no-load-optim'], 'linear')):
        engine.revert((LR_STEPS_PATCH,))
        # Saved with the next checkpoint, so that the third run finds it too.
        assert parse(*flags, *more).lr_decay_style == style
        assert ('lr-steps' in engine.applied()) == (style == PAPER)


MODEL = (
    '--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 '
    '--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --eval-iters 0 --eval-interval 100 '
    '--log-interval 1 --split 98,1,1 --num-workers 0'
).split()
ITERATIONS = ['--train-iters', '10', '--lr-warmup-iters', '2']
SAMPLES = ['--train-samples', '40', '--lr-warmup-samples', '8']
# Megatron prints the rate of the iteration that follows.
PRINTED = {i: rate for i, rate in enumerate([5e-3, *[1e-2] * 3, *[3.16e-3] * 4, 1e-3, 1e-3], 1)}


def train(*flags: str) -> dict[int, float]:
    """Iteration -> printed learning rate of a run through the launcher."""
    script = ROOT / 'examples' / 'pretrain_gpt.py'
    done = launch(1, '-m', 'megatron_mhc.run', script, *MODEL, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = re.findall(r'iteration +(\d+)/.*learning rate: (\S+)', done.stdout)
    return {int(iteration): float(rate) for iteration, rate in lines}


def test_a_standard_run_prints_the_steps_and_resumes_on_them(tmp_path):
    steps = [*STEP, '--lr-step-milestones', '0.5', '0.9']
    save = ['--save', str(tmp_path), '--save-interval', '6']
    assert train(*ITERATIONS, *steps, *save) == PRINTED
    load = ['--load', str(tmp_path), '--ckpt-step', '6', '--use-checkpoint-opt_param-scheduler']
    assert train(*ITERATIONS, *load) == {i: rate for i, rate in PRINTED.items() if i > 6}


def test_training_by_samples_prints_the_same_steps():
    mhc = ['--residual-type', 'mhc', '--mhc-mapping-lr-mult', '0.5']
    assert train(*SAMPLES, *STEP, '--lr-step-milestones', '0.5', '0.9', *mhc) == PRINTED
