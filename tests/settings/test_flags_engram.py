"""Flags of the conditional memory: what they set, and a line for everything that does not fit."""

from __future__ import annotations

import argparse

import pytest
import torch

from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.flags_engram import engram_config_from_args
from megatron_mhc.settings.refused_engram import check_engram


def test_without_the_flag_nothing_is_patched(parse):
    """The first test here: what another one applies stays."""
    from megatron_mhc.patches import engine

    parse()
    assert not {'gpt-model', 'param-groups', 'flops'} & set(engine.applied())
    parse('--engram-layers', '1')
    assert {'gpt-model', 'param-groups', 'flops', 'p2p'} < set(engine.applied())


MEMORY = '--engram-layers 2'
REFUSED = {
    '--engram-heads 4': '--engram-heads has no effect without --engram-layers',
    '--engram-layers two': 'argument --engram-layers: two: wanted an integer',
    '--engram-layers 3': '--engram-layers 3: the model has 2 layers',
    '--engram-layers 0': '--engram-layers 0: wanted distinct integers',
    f'{MEMORY} --engram-dim 100': '--engram-dim 100: not a multiple of the 2 orders x 8 heads',
    f'{MEMORY} --engram-dims 100': 'argument --engram-dims: no such flag',
    f'{MEMORY} --context-parallel-size 2': '--context-parallel-size cannot be combined',
    f'{MEMORY} --recompute-granularity full': '--recompute-granularity full cannot be combined',
    f'{MEMORY} --tensor-model-parallel-size 5': '--tensor-model-parallel-size cannot be combined',
    f'{MEMORY} --expert-model-parallel-size 5': '--expert-tensor-parallel-size cannot be combined',
    f'{MEMORY} --cuda-graph-impl local': '--cuda-graph-impl / --enable-cuda-graph cannot be',
    f'{MEMORY} --transformer-impl inference_optimized': 'inference_optimized cannot be combined',
    f'{MEMORY} --cpu-offloading-num-layers 1': '--cpu-offloading-num-layers / --fine-grained-act',
    f'{MEMORY} --use-torch-fsdp2': '--use-megatron-fsdp / --use-torch-fsdp2 cannot be combined',
    f'{MEMORY} --decoupled-lr 0.1': '--decoupled-lr cannot be combined with --engram-layers',
    f'{MEMORY} --hybrid-layer-pattern *': '--engram-layers 2: the model has 1 layers',
    f'{MEMORY} --yaml-cfg x.yaml': '--yaml-cfg cannot be combined with --engram-layers',
    f'{MEMORY} --sequence-parallel --tensor-model-parallel-size 2 --seq-length 16': ''
    '--sequence-parallel leaves 8 tokens to a rank',
}


SETTINGS = {
    'cpu_offloading': '--cpu-offloading-num-layers / --fine',
    'export_kd_teacher_load': '--export-kd-teacher-load',
    'external_cuda_graph': '--cuda-graph-impl / --enable-cuda-graph',
    'use_megatron_fsdp': '--use-megatron-fsdp',
}


@pytest.mark.parametrize('name', SETTINGS)
def test_settings_of_other_releases_and_of_models_are_refused(name):
    with pytest.raises(ValueError, match=SETTINGS[name]):
        check_engram(argparse.Namespace(**{name: True}), EngramConfig((2,)))


@pytest.mark.parametrize('flags', REFUSED)
def test_refusals_are_one_line_and_name_the_flag(refused, flags):
    assert REFUSED[flags] in refused(flags)


def test_flags_reach_the_settings_and_survive_a_second_reading(parse):
    args = parse(*'--engram-layers 2 1 --engram-ngram-orders 4 2 --engram-lr-mult 2'.split())
    expected = EngramConfig((1, 2), (2, 4), lr_mult=2.0)
    assert engram_config_from_args(args) == expected
    for name, value in vars(args).items():
        if name.startswith('engram_'):
            assert isinstance(value, (int, float, list)), name


def test_checkpoints_of_another_memory_are_refused(parse, tmp_path, capsys):
    def saved(name, **values):
        folder = tmp_path / name / 'iter_0000010' / 'mp_rank_00'
        folder.mkdir(parents=True)
        (tmp_path / name / 'latest_checkpointed_iteration.txt').write_text('10')
        args = argparse.Namespace(residual_type='standard', **values)
        torch.save({'args': args, 'model': {}}, folder / 'model_optim_rng.pt')
        return str(tmp_path / name)

    plain, seven = saved('plain'), saved('seven', engram_layers=[2], engram_seed=7)
    parse('--load', plain)
    parse('--load', seven, '--engram-layers', '2', '--engram-seed', '7')
    parse(
        '--load',
        seven,
        *'--engram-layers 2 --engram-seed 7 --engram-lr-mult 1'.split(),
        '--finetune',
    )
    for flags, said in (
        ((plain, '--engram-layers', '2'), 'trained with the memory [none]'),
        ((seven,), 'but this run asks for [none]'),
        ((seven, '--engram-layers', '2'), 'but this run asks for [layers=(2,)'),
        (
            (seven, *'--engram-layers 2 --engram-seed 7 --engram-lr-mult 1'.split()),
            '--engram-lr-mult 1.0',
        ),
    ):
        with pytest.raises(SystemExit):
            parse('--load', *flags)
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and said in error
