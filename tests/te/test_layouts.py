"""Transformer Engine's layers in parallel layouts, on the CPU: what one process computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from layout_cases import MOE, OWN_NORM_TOLERANCE, SPLIT_SUM_TOLERANCE, launch
from te_wheel import unpacked

MHC = {'residual': {'residual_type': 'mhc', 'init': 'identity'}}
FP8 = {'fp8': 'hybrid', 'fp8_recipe': 'tensorwise', 'add_bias_linear': False}
MODELS = {
    'standard': {},
    'mhc': MHC,
    'moe': {**MHC, 'config': {**MOE, 'moe_grouped_gemm': True}},
    'fp8': {**MHC, 'config': FP8},
    'fp8-delayed': {**MHC, 'config': FP8 | {'fp8_recipe': 'delayed'}},
}
V = {'layout': {'pp': 2, 'vpp': 2}, 'config': {'pipeline_model_parallel_layout': 'Et|t|t|tL'}}


def on_v(schedule: str) -> dict:
    return {**V, 'schedule': {'schedule': schedule}}


ON_LINE = {'layout': {'pp': 2}, 'schedule': {'schedule': 'zb-h1'}}
# model, what is different from one process
PIPELINES = [
    ('mhc', {'layout': {'pp': 2}}),
    *((m, on_v(schedule)) for m in list(MODELS)[:-1] for schedule in ('zb-v', 'dualpipev-w')),
    *((model, ON_LINE) for model in ('mhc', 'fp8-delayed')),
]
TENSOR = [('mhc', {'layout': {'tp': 2}}), ('mhc', {'layout': {'tp': 2, 'sp': True}})]


def name_of(model: str, changes: dict) -> str:
    how = changes.get('schedule', {}).get('schedule') or ''.join(changes['layout'])
    return f'{model}-{how}'


@pytest.fixture(scope='module')
def wheel():
    try:
        return str(unpacked())
    except RuntimeError as error:
        pytest.skip(f'{error}; .ci/run, which fetches it first, skips nothing')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, wheel):
    folder = tmp_path_factory.mktemp('te')
    alone, split = [], []
    for model, settings in MODELS.items():
        base = {'weights': f'{model}-weights', **settings}
        alone.append({**base, 'name': model, 'reference': True})
        for other, changes in PIPELINES + TENSOR:
            if other == model:
                config = {**settings.get('config', {}), **changes.get('config', {})}
                name = name_of(model, changes)
                split.append({**base, **changes, 'config': config, 'name': name})
    results = launch(1, alone, folder, MEGATRON_MHC_TEST_TE=wheel)
    results.update(launch(2, split, folder, MEGATRON_MHC_TEST_TE=wheel))
    return folder, results


def losses(results: dict, case: str) -> list[float]:
    return [loss for rank in results[case]['losses'] for loss in rank]


def names(cases: list) -> list:
    return [pytest.param(name_of(*case), case[0], id=name_of(*case)) for case in cases]


@pytest.mark.parametrize(('name', 'model'), names(PIPELINES))
def test_pipelines_bit_for_bit(runs, tensors, name, model):
    folder, results = runs
    assert losses(results, name) == losses(results, model) != []
    got, wanted = tensors(folder / name), tensors(folder / model)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize(('name', 'model'), names(TENSOR))
def test_tensor_parallel_to_rounding(runs, tensors, name, model):
    folder, results = runs
    torch.testing.assert_close(losses(results, name), losses(results, model), rtol=1e-6, atol=0)
    got, wanted = tensors(folder / name), tensors(folder / model)
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for key, value in wanted.items():
        error = (got[key] - value).norm()
        assert error <= SPLIT_SUM_TOLERANCE * whole, (key, error / whole)
        assert error <= OWN_NORM_TOLERANCE * value.norm(), key


def test_doctor_tells_of_a_half_installed_transformer_engine(wheel):
    """The wheel without its compiled half raises when it is imported, and so does Megatron then."""
    done = subprocess.run(
        [sys.executable, '-m', 'megatron_mhc', 'doctor'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([wheel, *filter(None, sys.path)])},
    )
    assert done.returncode == 1
    assert 'transformer-engine BROKEN: RuntimeError: Found empty' in ' '.join(done.stdout.split())
    assert 'problem: Megatron imports transformer-engine' in done.stdout and not done.stderr
