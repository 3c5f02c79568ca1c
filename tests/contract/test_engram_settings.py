"""Conditional memory: the optimizer's groups, refused configs, and sizes on paper."""

from __future__ import annotations

import inspect

import pytest
import torch

from megatron_mhc.recipes.build import build as build_on_paper
from megatron_mhc.recipes.build import counted, model_arguments
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.sizing.flops import STEP, token_flops
from megatron_mhc.sizing.shape import shape_from_args
from megatron_mhc.sizing.size import parameters, summary

SMALL = {'layers': (2, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
LR, MIN_LR = 0.5, 0.05


def table(name):
    return name.endswith('.table.weight')


def optimizer_config(**settings):
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(**{'lr': LR, 'min_lr': MIN_LR, 'weight_decay': 0.1, **settings})


def grouped(model, config, standard_rule=True):
    """Parameter name -> its group, through Megatron's own grouping."""
    from megatron.core import optimizer

    overrides = optimizer.get_standard_config_overrides(config) if standard_rule else None
    groups = optimizer._get_param_groups([model], config, overrides)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group['params']}


@pytest.mark.parametrize('residual', [None, {'residual_type': 'mhc', 'mapping_lr_mult': 0.5}])
@pytest.mark.parametrize('standard_rule', [True, False])
def test_tables_have_a_rate_of_their_own_and_no_decay(build, residual, standard_rule):
    config = optimizer_config()
    found = grouped(build(residual, engram=SMALL), config, standard_rule)
    plain = grouped(build(residual), config, standard_rule)
    assert sum(map(table, found)) == 2 and plain.keys() < found.keys()
    for name, group in found.items():
        factor, decay = (5, 0.0) if table(name) else (1, None)
        if name in plain:
            expected = {key: value for key, value in plain[name].items() if key != 'params'}
            assert {key: value for key, value in group.items() if key != 'params'} == expected
        else:
            assert (group['max_lr'], group['min_lr']) == (LR * factor, MIN_LR * factor), name
            assert decay is None or group['wd_mult'] == decay
    for name in ('hidden_norm', 'key_norm', 'convolution_norm'):
        assert found[f'decoder.engram.layer_2.{name}']['wd_mult'] == float(
            plain['decoder.layers.0.input_layernorm.weight']['wd_mult']
        )


@pytest.mark.parametrize('factor', [5.0, 1.0])
def test_a_checkpoint_can_tell_the_groups_apart(build, factor):
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    found = grouped(build(engram={**SMALL, 'lr_mult': factor}), optimizer_config())
    groups = {id(group): group for group in found.values()}.values()
    identities = {tuple(group.get(key) for key in param_group_identifier_keys) for group in groups}
    assert len(identities) == len(groups) == (3 if factor != 1 else 2)


def test_one_step_moves_the_rows_that_were_read_by_their_own_rate(build, step):
    """Adam's first step is the learning rate, up to its eps."""
    from megatron.core import optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    inner = build(engram={**SMALL, 'layers': (2,)})
    with torch.no_grad():
        inner.decoder.engram.layer_2.value.normal_()
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(), inner)
    config = optimizer_config(clip_grad=0.0, adam_eps=1e-30)
    adam = optimizer.get_megatron_optimizer(
        config, [model], optimizer.get_standard_config_overrides(config)
    )
    scheduler = OptimizerParamScheduler(
        adam, 0.0, LR, MIN_LR, 0, 10, 'constant', 0.1, 0.1, 10, 'constant'
    )
    weight = inner.decoder.engram.layer_2.table.weight
    before = weight.detach().clone()
    model.zero_grad_buffer()
    step(inner)
    scheduler.step(1)
    assert adam.step()[0]
    moved = (weight - before).abs()
    read = weight.main_grad.abs().amax(-1) > 0
    assert read.any() and not read.all()
    assert moved[read].max().item() == pytest.approx(5 * LR, rel=1e-2)
    assert torch.equal(weight[~read], before[~read])


def test_muon_leaves_tables_norms_and_convolution_to_adam(build):
    from megatron.core import optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.muon import get_megatron_muon_optimizer

    from megatron_mhc.compat import core_minor, core_version

    inner = build(engram=SMALL)
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(), inner)
    config = optimizer_config(optimizer='muon')
    make = optimizer.get_megatron_optimizer
    if core_minor(core_version()) == '0.17':
        make = get_megatron_muon_optimizer
    chain = make(config, [model], optimizer.get_standard_config_overrides(config))
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    by_muon = {
        names[id(parameter)]
        for part in chain.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group['params']
        if 'Muon' in type(part.optimizer).__name__
    }
    own = {name for name in by_muon if '.engram.' in name}
    prefix = 'decoder.engram.layer_'
    assert own == {f'{prefix}{n}.{name}' for n in (2, 3) for name in ('key', 'value')}


def test_another_model_is_refused(build):
    from megatron_mhc.engram.groups import require_memory

    require_memory([build(engram=SMALL)], EngramConfig(**SMALL))
    with pytest.raises(RuntimeError, match='--engram-layers 2 3 had no effect: only GPTModel'):
        require_memory([build()], EngramConfig(**SMALL))


REFUSED_CONFIGS = {
    '--recompute-granularity full': {
        'recompute_granularity': 'full',
        'recompute_method': 'uniform',
        'recompute_num_layers': 1,
    },
    '--residual-type mudd cannot be combined': {'residual': {'residual_type': 'mudd'}},
    '--engram-layers 3: the model has 2 layers': {'num_layers': 2},
}


@pytest.mark.parametrize('said', REFUSED_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build(engram=SMALL, **REFUSED_CONFIGS[said])


@pytest.mark.parametrize('residual', [{}, {'residual-type': 'mhc', 'mhc-num-residual-streams': 3}])
@pytest.mark.parametrize('tied', [True, False])
def test_sizes_are_those_of_the_built_model(parse, residual, tied):
    from megatron.training import training

    sizes = {
        'num-layers': 3,
        'hidden-size': 32,
        'num-attention-heads': 4,
        'seq-length': 16,
        'max-position-embeddings': 24,
        'engram-layers': (2, 3),
        'engram-heads': 2,
        'engram-table-size': 50,
        'engram-dim': 16,
        **residual,
        **({} if tied else {'untie-embeddings-and-output-weights': True}),
    }
    args = model_arguments(sizes, 64)
    shape, model = shape_from_args(args), build_on_paper(args)
    assert summary(shape) == counted(model, args)
    own = {name: p.numel() for name, p in model.named_parameters() if '.engram.' in name}
    tables = sum(count for name, count in own.items() if table(name))
    parts = parameters(shape)
    assert (parts['engram_tables'], parts['engram']) == (tables, sum(own.values()) - tables)
    n = 3 if residual else 1
    flops = 2 * (2 * (n + 1) * 32 * 16 + n * 32 * (3 + 8 + 2))
    assert token_flops(shape)['engram'] == flops
    count = training.num_floating_point_operations
    added = count(args, 5) - inspect.unwrap(count)(args, 5)
    assert added == STEP * 5 * 16 * (flops + token_flops(shape)['mhc'])
