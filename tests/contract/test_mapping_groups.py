"""Which optimizer, learning rate and decay mapping parameters get, beside Megatron's own rules."""

from __future__ import annotations

import pytest

LR, MIN_LR = 1e-2, 1e-3
LEARNED = {'stream_merge': 'learned'}
MAPPING = ('hyper_connection', 'stream_merge')


def is_phi(name):
    return name.endswith('mapping_proj.weight')


def is_mapping(name):
    return any(part in name for part in MAPPING)


def optimizer_config(**settings):
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(
        **{'optimizer': 'adam', 'lr': LR, 'min_lr': MIN_LR, 'weight_decay': 0.1, **settings}
    )


def grouped(model, config, overrides=None):
    """Parameter name -> its group, and all groups, through Megatron's own grouping."""
    from megatron.core import optimizer

    standard = optimizer.get_standard_config_overrides(config)
    groups = optimizer._get_param_groups([model], config, {**standard, **(overrides or {})})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group['params']}, groups


def rates(group):
    return group['max_lr'], group['min_lr']


@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
@pytest.mark.parametrize('factor', [0.25, 0.0])
def test_the_factor_is_for_phi_alone(build, residual_type, factor):
    model = build({'residual_type': residual_type, 'mapping_lr_mult': factor, **LEARNED})
    of, _ = grouped(model, optimizer_config())
    assert any(map(is_phi, of)) and set(of) == {name for name, _ in model.named_parameters()}
    for name, group in of.items():
        expected = factor if is_phi(name) else 1.0
        assert rates(group) == (LR * expected, MIN_LR * expected), name
        # What Megatron logs as the learning rate is that of a default group.
        assert group['default_config'] == (not is_phi(name)), name


def test_a_minimum_that_is_not_set_stays_so(build):
    model = build({'residual_type': 'mhc', 'mapping_lr_mult': 0.5})
    of, _ = grouped(model, optimizer_config(min_lr=None))
    assert {rates(group) for name, group in of.items() if is_phi(name)} == {(LR / 2, None)}


@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
@pytest.mark.parametrize('factor', [1.0, 0.5])
def test_the_static_variant_has_no_decay(build, residual_type, factor):
    static = {'hc_variant': 'static'} if residual_type == 'hc' else {'fixed_mappings': ('res',)}
    model = build({'residual_type': residual_type, 'mapping_lr_mult': factor, **static})
    of, _ = grouped(model, optimizer_config())
    vectors = [name for name in of if is_mapping(name) and not is_phi(name)]
    assert vectors and {of[name]['wd_mult'] for name in vectors} == {0.0}
    assert {of[name]['wd_mult'] for name in of if is_phi(name)} <= {1.0}


@pytest.mark.parametrize('factor', [1.0, 0.5])
@pytest.mark.parametrize('decay', [True, False])
def test_megatrons_overrides_keep_their_say(build, factor, decay):
    """muP rescales every matrix, a decoupled rate the embeddings; ours multiplies the former."""
    from megatron.core.optimizer import get_mup_config_overrides

    residual = {'mapping_lr_mult': factor, 'mapping_weight_decay': decay, **LEARNED}
    model = build({'residual_type': 'mhc', **residual})
    config = optimizer_config(
        decoupled_lr=0.7, decoupled_min_lr=0.07, apply_wd_to_qk_layernorm=True
    )
    of, _ = grouped(model, config, get_mup_config_overrides(config, 4.0))
    for name, group in of.items():
        if is_phi(name):
            assert rates(group) == (LR / 4 * factor, MIN_LR / 4 * factor), name
            assert group['eps'] == config.adam_eps / 4
            assert group['wd_mult'] == float(decay)
        elif is_mapping(name):
            assert (*rates(group), group['wd_mult']) == (LR, MIN_LR, 0.0), name
    assert rates(of['output_layer.weight']) == (0.7, 0.07)
    assert rates(of['decoder.layers.0.mlp.linear_fc1.weight']) == (LR / 4, MIN_LR / 4)


def test_other_parameters_are_grouped_as_without_streams(build):
    stock, _ = grouped(build(), optimizer_config(decoupled_lr=0.7))
    ours, _ = grouped(
        build({'residual_type': 'mhc', 'mapping_lr_mult': 0.5}), optimizer_config(decoupled_lr=0.7)
    )
    assert set(stock) <= set(ours)
    for name, group in stock.items():
        mine = {key: value for key, value in ours[name].items() if key != 'params'}
        assert mine == {key: value for key, value in group.items() if key != 'params'}, name


@pytest.mark.parametrize('factor', [1.0, 0.5])
@pytest.mark.parametrize('decay', [True, False])
def test_a_checkpoint_can_tell_the_groups_apart(build, factor, decay):
    """Saved groups are found by these keys; of two that share them one gets the other's rate."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    residual = {'mapping_lr_mult': factor, 'mapping_weight_decay': decay}
    _, groups = grouped(build({'residual_type': 'mhc', **residual}), optimizer_config())
    identities = {tuple(group.get(key) for key in param_group_identifier_keys) for group in groups}
    assert len(identities) == len(groups) == (2 if factor == 1 else 3)


def wrapped(model):
    """As in training: DDP around the cast to bf16."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    model.config.bf16 = True
    inner = Float16Module(model.config, model)
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), inner)


def test_parameters_are_found_inside_wrappers(build):
    model = wrapped(build({'residual_type': 'mhc', 'mapping_lr_mult': 0.5, **LEARNED}))
    of, _ = grouped(model, optimizer_config(bf16=True))
    assert any(name.startswith('module.module.') for name in of)
    scaled = {name for name, group in of.items() if rates(group) != (LR, MIN_LR)}
    assert scaled == set(filter(is_phi, of)) != set()


def trained_by(model, **settings):
    """Parameter name -> class of the optimizer that Megatron builds for it."""
    from megatron.core import optimizer
    from megatron.core.optimizer.muon import get_megatron_muon_optimizer

    from megatron_mhc.compat import core_minor, core_version

    config = optimizer_config(optimizer='muon', **settings)
    build = optimizer.get_megatron_optimizer
    if core_minor(core_version()) == '0.17':
        build = get_megatron_muon_optimizer
    chain = build(config, [model], optimizer.get_standard_config_overrides(config))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (type(part.optimizer).__name__, group['wd_mult'], group['max_lr'])
        for part in chain.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group['params']
    }


@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
@pytest.mark.parametrize('mapping_optimizer', ['matrix', 'scalar'])
@pytest.mark.parametrize('decay', [True, False])
def test_muon_trains_phi_and_nothing_else_of_the_mapping(
    build, residual_type, mapping_optimizer, decay
):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    residual = {'mapping_optimizer': mapping_optimizer, 'mapping_weight_decay': decay, **LEARNED}
    inner = build({'residual_type': residual_type, 'mapping_lr_mult': 0.5, **residual})
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(), inner)
    of = trained_by(model)
    assert set(of) == {name for name, _ in model.named_parameters()}
    muon, adam = (
        of['module.decoder.layers.0.mlp.linear_fc1.weight'][0],
        of['module.embedding.word_embeddings.weight'][0],
    )
    assert 'Muon' in muon and muon != adam
    for name, (optimizer, wd_mult, lr) in of.items():
        if is_phi(name):
            assert optimizer == (muon if mapping_optimizer == 'matrix' else adam), name
            assert (wd_mult, lr) == (float(decay), LR / 2), name
        elif is_mapping(name):
            assert (optimizer, wd_mult, lr) == (adam, 0.0, LR), name


def test_the_layer_wise_optimizer_sorts_buffers_by_the_same_rule(build):
    """Its DDP buffers are laid out before the groups exist, by a predicate of their own."""
    from megatron.core.optimizer import layer_wise_optimizer

    # 0.17 has no such buffers.
    managed = getattr(layer_wise_optimizer, 'is_managed_by_layer_wise_optimizer', None)
    for mapping_optimizer in ('matrix', 'scalar'):
        model = build({'residual_type': 'mhc', 'mapping_optimizer': mapping_optimizer, **LEARNED})
        for name, parameter in model.named_parameters():
            if managed and is_mapping(name):
                wanted = is_phi(name) and mapping_optimizer == 'matrix'
                assert managed(parameter) == wanted, name


def test_a_decoupled_rate_and_phi_on_adam_exclude_each_other(build):
    model = build({'residual_type': 'mhc', 'mapping_optimizer': 'scalar'})
    with pytest.raises(ValueError, match='--decoupled-lr with --mhc-mapping-optimizer scalar'):
        grouped(model, optimizer_config(decoupled_lr=0.1))


def test_one_step_moves_phi_by_its_own_rate(build, step):
    """The factor reaches the update: Adam's first step is the learning rate, up to its eps."""
    from megatron.core import optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    inner = build({'residual_type': 'mhc', 'mapping_lr_mult': 0.25, 'init': 'identity'})
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(), inner)
    config = optimizer_config(weight_decay=0.0, clip_grad=0.0, adam_eps=1e-30)
    adam = optimizer.get_megatron_optimizer(
        config, [model], optimizer.get_standard_config_overrides(config)
    )
    scheduler = OptimizerParamScheduler(
        adam, 0.0, LR, MIN_LR, 0, 10, 'constant', 0.0, 0.0, 10, 'constant'
    )
    before = {name: p.detach().clone() for name, p in inner.named_parameters()}
    model.zero_grad_buffer()
    step(inner)
    scheduler.step(1)
    assert adam.step()[0]
    for name, parameter in inner.named_parameters():
        # The streams of the first layer are equal, so that H_res there has no gradient yet.
        if is_mapping(name) and 'layers.0' not in name:
            moved = (parameter - before[name]).abs().max().item()
            expected = LR * (0.25 if is_phi(name) else 1.0)
            assert moved == pytest.approx(expected, rel=1e-2), name
