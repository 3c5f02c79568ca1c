"""Distributed optimizers of a bf16 model with fp32 mapping parameters: what a checkpoint keeps.

Two data-parallel ranks train through Megatron's own loop, then resume from the middle. Everything
is compared in the checkpoints, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from loop_cases import resume, spawn

from megatron_mhc.compat import core_version

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or core_version() is None,
    reason='the CPU device stands in for CUDA under megatron-core',
)

COMMON = (
    '--num-layers 2 --bf16 --residual-type mhc --mhc-init identity --weight-decay 0.1 '
    '--mhc-mapping-lr-mult 0.5 --use-distributed-optimizer '
)
OPTIMIZERS = {
    # By name, so that a state can be laid beside its parameter.
    'adam': '--dist-ckpt-optim-fully-reshardable --overlap-grad-reduce --overlap-param-gather ',
    'muon': '--optimizer muon --muon-momentum 0.95 --dist-ckpt-optim-fully-reshardable ',
    'scalar': '--optimizer muon --mhc-mapping-optimizer scalar '
    '--dist-ckpt-optim-fully-reshardable ',
    'frozen': '--with-frozen-base --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce '
    '--overlap-param-gather --recompute-granularity full --recompute-method uniform '
    '--recompute-num-layers 1 ',
}
PHI = 'decoder.layers.mlp_hyper_connection.mapping_proj.weight'
BIAS = 'decoder.layers.mlp_hyper_connection.bias'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('optimizer')
    cases = {}
    for name, flags in OPTIMIZERS.items():
        cases[name] = f'{COMMON}{flags} --save {folder / name}'
        again = f'{resume(folder / name)} --save {folder / name}-resumed'
        cases[f'{name} resumed'] = f'{COMMON}{flags}{again}'
    return folder, spawn(folder, 2, cases)


def has_fp32_bits(tensor):
    return tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_resumed_run_has_every_bit(runs, tensors, name):
    folder, curves = runs
    assert curves[name][3:] == curves[f'{name} resumed']
    ended, resumed = (tensors(folder / path / 'iter_0000005') for path in (name, f'{name}-resumed'))
    assert ended.keys() == resumed.keys()
    for key, value in ended.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_optimizer_holds_the_models_own_fp32_parameters(runs, tensors, name):
    """No copy of a mapping parameter, nor a moment, was ever rounded to bf16."""
    folder, _ = runs
    state = tensors(folder / name / 'iter_0000005')
    for parameter in (PHI, BIAS):
        assert has_fp32_bits(state[parameter]), parameter
        own = {key: value for key, value in state.items() if key.endswith('.' + parameter)}
        copies = {key for key in own if '.param.' in key or '.fp32_param.' in key}
        moments = own.keys() - copies
        assert len(copies) == 1 and len(moments) == (
            1 if parameter == PHI and name == 'muon' else 2
        ), own.keys()
        for key in copies:
            assert torch.equal(own[key], state[parameter]), key
        for key in moments:
            assert has_fp32_bits(own[key]), key


def test_a_frozen_base_stays_while_maps_learn(runs, tensors):
    folder, _ = runs
    before, after = (tensors(folder / 'frozen' / f'iter_000000{i}') for i in (3, 5))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    models = {key for key in before if key.startswith(('decoder.', 'embedding.', 'output_layer.'))}
    assert {key for key in models if 'hyper_connection' in key} >= {PHI, BIAS}
    assert changed & models == {key for key in models if 'hyper_connection' in key}
    # Nothing is kept for what does not train.
    moments = {key for key in before if key.startswith('optimizer.') and 'exp_avg' in key}
    assert moments and all('hyper_connection' in key for key in moments)
