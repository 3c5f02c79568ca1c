"""A report is the same in every parallel layout as in one process."""

from __future__ import annotations

import pytest
import torch
from layout_cases import launch

TOKENS = 20  # of 32 in a microbatch
WHOLE = 64  # more than there are
MODELS = {
    'mhc': {'residual': {'residual_type': 'mhc', 'init': 'identity'}},
    'hc': {'residual': {'residual_type': 'hc'}},
}
FULL = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 2}
V = {
    'layout': {'pp': 2, 'vpp': 2},
    'config': {'pipeline_model_parallel_layout': 'Et|t|t|tL'},
    'schedule': {'schedule': 'dualpipev'},
    'recompute': 'stage',
}
# name -> (world, changes, pipeline rank of the 8 sublayers). The reference is one process.
SAME = {
    'full': (1, {'config': FULL}, [0] * 8),
    'pp2': (2, {'layout': {'pp': 2}}, [0] * 4 + [1] * 4),
    'pp2-vpp2': (2, {'layout': {'pp': 2, 'vpp': 2}}, [0, 0, 1, 1, 0, 0, 1, 1]),
    'pp2-full': (2, {'layout': {'pp': 2}, 'config': FULL}, [0] * 4 + [1] * 4),
    'v': (2, V, [1, 1, 0, 0, 0, 0, 1, 1]),
    'tp2': (2, {'layout': {'tp': 2}}, [0] * 8),
}
# Sequence parallelism gives a rank 16 tokens, so that which are chosen depends on it.
SAME_WHOLE = {'tp2-sp': (2, {'layout': {'tp': 2, 'sp': True}}, [0] * 8)}
REPLICATED = {'dp2': {}, 'dp2-dist': {'step': 'dist'}}


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp('monitor')
    cases: dict[int, list[dict]] = {1: [], 2: []}
    for model, base in MODELS.items():
        base = {'weights': f'{model}-weights', 'tokens': TOKENS, **base}
        whole = {**base, 'tokens': WHOLE}
        cases[1] += [
            {**base, 'name': f'alone-{model}', 'reference': True},
            {**whole, 'name': f'whole-{model}'},
            {**base, 'name': f'two-{model}', 'microbatches': 2},
            {**base, 'name': f'second-{model}', 'microbatches': 2, 'skipped': 1},
        ]
        for name, (world, changes, _) in SAME.items():
            case = {**base, **changes, 'name': f'{name}-{model}'}
            if 'recompute' in case:
                blocks = case.pop('recompute')
                case['residual'] = {**case['residual'], 'recompute_layer_num': blocks}
            cases[world].append(case)
        for name, (world, changes, _) in SAME_WHOLE.items():
            cases[world].append({**whole, **changes, 'name': f'{name}-{model}'})
        for name, changes in REPLICATED.items():
            cases[2].append({**base, 'microbatches': 2, **changes, 'name': f'{name}-{model}'})
    results = launch(1, cases[1], folder) | launch(2, cases[2], folder)
    return {name: result['report'] for name, result in results.items()}


def assert_same(report, wanted, names=None):
    for name in names or wanted.keys() - {'pipeline-rank'}:
        got, value = (torch.tensor(r[name], dtype=torch.float64) for r in (report, wanted))
        # A norm of gradients may be small beside what was cancelled in it, and the gradient of one
        # logit is small.
        absolute = 1e-11 if name == 'res-logit-grad-max' else 2e-6
        assert torch.allclose(got, value, rtol=2e-5, atol=absolute), name


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('name', [*SAME, *SAME_WHOLE])
def test_a_layout_reports_what_one_process_does(reports, name, model):
    report = reports[f'{name}-{model}']
    assert_same(report, reports[f'{"whole" if name in SAME_WHOLE else "alone"}-{model}'])
    assert report['pipeline-rank'] == (SAME | SAME_WHOLE)[name][2]


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('name', REPLICATED)
def test_replicas_report_the_tokens_of_both(reports, name, model):
    """Each rank's first microbatch is measured; gradients are those of the whole step."""
    report, two, second = (reports[f'{n}-{model}'] for n in (name, 'two', 'second'))
    gradients = ['mapping-grad-norm']
    assert_same(report, two, gradients)
    both = {}
    for key in two.keys() - {'pipeline-rank', *gradients}:
        pair = torch.tensor([two[key], second[key]], dtype=torch.float64)
        extreme = {'max': pair.amax(0), 'min': pair.amin(0)}
        both[key] = extreme.get(key.rpartition('-')[2], pair.mean(0)).tolist()
    assert_same(report, both)


def test_reports_tell_sublayers_and_tokens_apart(reports):
    """Comparing constants would prove nothing."""
    for model in MODELS:
        alone, whole = reports[f'alone-{model}'], reports[f'whole-{model}']
        for name in ('amax-composite-gain-backward', 'stream-rms', 'mapping-grad-norm', 'pre-max'):
            assert len(set(alone[name])) == 8
        assert alone['stream-rms'] != whole['stream-rms']
        assert all(value > 0 for value in alone['mapping-grad-norm'])
    assert min(reports['alone-mhc']['res-logit-grad-max'][1:]) > 1e-7
