"""Megatron's optimizers sort the parameters of the maps as the papers train them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('emerging_optimizers', reason='Muon comes with emerging-optimizers')

OWN = ('hyper_connection', 'stream_merge')


def muon(model):
    """Megatron's Muon for ``model``, by the function of this release."""
    from megatron.core import optimizer
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    config = OptimizerConfig(
        optimizer='muon',
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.1,
        muon_tp_mode='blockwise',
    )
    overrides = get_standard_config_overrides(config)
    try:
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer as build
    except ImportError:
        build = optimizer.get_megatron_optimizer
    return build(config, [model], config_overrides=overrides, use_gloo_process_groups=False)


def sorted_parameters(model, chained):
    """Parameter name -> (optimizer class, its group)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (type(inner.optimizer).__name__, group)
        for inner in chained.chained_optimizers
        for group in inner.optimizer.param_groups
        for parameter in group['params']
    }


@pytest.fixture
def wrapped(build):
    """``wrapped(**residual)``: a model in Megatron's data-parallel wrapper."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    def make(**residual):
        model = build({'stream_merge': 'learned', **residual})
        return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)

    return make


@pytest.mark.parametrize('residual_type', ['mhc', 'hc'])
def test_muon_takes_the_matrix_phi_and_nothing_else_of_the_maps(wrapped, residual_type):
    made = wrapped(residual_type=residual_type)
    found = sorted_parameters(made, muon(made))
    assert set(found) == {name for name, _ in made.named_parameters()}
    own = {name: entry for name, entry in found.items() if any(word in name for word in OWN)}
    assert len({name.rpartition('.')[2] for name in own}) >= 3
    for name, (kind, group) in own.items():
        assert ('Muon' in kind) == name.endswith('mapping_proj.weight'), (name, kind)
        assert group['wd_mult'] == (1.0 if name.endswith('mapping_proj.weight') else 0.0), name


@pytest.mark.parametrize('optimizer', ['adam', 'muon'])
def test_phi_has_its_own_learning_rate(wrapped, optimizer):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    made = wrapped(mapping_lr_mult=0.25)
    if optimizer == 'muon':
        chained = muon(made)
    else:
        config = OptimizerConfig(optimizer='adam', lr=1e-2, min_lr=1e-3, weight_decay=0.1)
        chained = get_megatron_optimizer(config, [made], use_gloo_process_groups=False)
    for name, (_, group) in sorted_parameters(made, chained).items():
        phi = name.endswith('mapping_proj.weight')
        assert group['max_lr'] == (2.5e-3 if phi else 1e-2), name
        assert group['min_lr'] == (2.5e-4 if phi else 1e-3), name


def test_muon_moves_every_parameter_of_the_maps(wrapped, step):
    made = wrapped(init='identity')
    chained = muon(made)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    made.zero_grad_buffer()
    step(made)
    made.finish_grad_sync()
    assert chained.step()[0]
    for name, parameter in made.named_parameters():
        if any(word in name for word in OWN):
            assert not torch.equal(parameter, before[name]), name
