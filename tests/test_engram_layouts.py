"""A conditional memory in several layouts of ranks: loss, gradients and steps of one process.

Tables are written by one process and read by tensor-parallel ranks, whose gradients are read whole
again, so that those cases show too that checkpoints reshard.
"""

from __future__ import annotations

import pytest
import torch
from layout_cases import MOE, OWN_NORM_TOLERANCE, SPLIT_SUM_TOLERANCE, launch

# 32 tokens: with sequence parallelism 16 a rank, of which the convolution reads 9 from the other.
ENGRAM = {'layers': (1, 2), 'heads': 2, 'table_size': 50, 'dim': 16}
MHC = {'residual_type': 'mhc', 'init': 'identity'}
MODELS = {
    'standard': {'engram': ENGRAM},
    'mhc': {'engram': ENGRAM, 'residual': MHC},
    'moe': {'engram': ENGRAM, 'residual': MHC, 'config': MOE},
}
# (case, model, changes, bitwise)
CASES = [
    ('dp2', 'mhc', {'microbatches': 2}, True),
    ('dp2', 'standard', {'microbatches': 2}, True),
    ('pp2', 'mhc', {'layout': {'pp': 2}}, True),
    ('pp2', 'standard', {'layout': {'pp': 2}}, True),
    ('tp2', 'mhc', {'layout': {'tp': 2}}, False),
    ('tp2', 'standard', {'layout': {'tp': 2}}, False),
    ('tp2-sp', 'mhc', {'layout': {'tp': 2, 'sp': True}}, False),
    ('tp2-sp', 'standard', {'layout': {'tp': 2, 'sp': True}}, False),
    ('ep2', 'moe', {'layout': {'ep': 2}, 'microbatches': 2}, False),
]


def reference_name(model, changes):
    return f'{model}-reference-{changes.get("microbatches", 4)}'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('engram')
    alone, together = [], []
    for model, base in MODELS.items():
        first = {'weights': f'{model}-weights', **base}
        alone.append({**first, 'name': reference_name(model, {}), 'reference': True})
        two = {'microbatches': 2}
        alone.append({**first, **two, 'name': reference_name(model, two)})
    for name, model, changes, _ in CASES:
        case = {'weights': f'{model}-weights', **MODELS[model], **changes}
        together.append({**case, 'name': f'{name}-{model}'})
    for kind in ('plain', 'dist'):
        case = {'weights': 'mhc-weights', **MODELS['mhc'], 'microbatches': 2, 'step': kind}
        together.append({**case, 'name': f'{kind}-step'})
    return folder, launch(1, alone, folder) | launch(2, together, folder)


@pytest.mark.parametrize(
    ('name', 'model', 'changes', 'bitwise'),
    [pytest.param(*case, id=f'{case[0]}-{case[1]}') for case in CASES],
)
def test_layout_equals_one_process(runs, tensors, name, model, changes, bitwise):
    folder, results = runs
    case, reference = f'{name}-{model}', reference_name(model, changes)
    got = sorted(loss for rank in results[case]['losses'] for loss in rank)
    wanted = sorted(loss for rank in results[reference]['losses'] for loss in rank)
    assert got == (wanted if bitwise else pytest.approx(wanted, rel=SPLIT_SUM_TOLERANCE))
    norms = [results[name]['grad_norm'] for name in (case, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=SPLIT_SUM_TOLERANCE)
    gradients, references = tensors(folder / case), tensors(folder / reference)
    assert gradients.keys() == references.keys()
    assert sum('.engram.' in key for key in gradients) == 2 * 7
    whole = torch.stack([gradient.norm() for gradient in references.values()]).norm()
    for key, expected in references.items():
        if '.engram.' in key:
            assert expected.abs().max() > 1e-6, key
        if bitwise:
            assert torch.equal(gradients[key], expected), key
        error = (gradients[key] - expected).norm()
        assert error <= SPLIT_SUM_TOLERANCE * whole, (key, error / whole)
        assert error <= OWN_NORM_TOLERANCE * expected.norm(), key


def test_distributed_optimizer_steps_as_the_plain_one(runs, tensors):
    folder, _ = runs
    plain, sharded = tensors(folder / 'plain-step'), tensors(folder / 'dist-step')
    before = tensors(folder / 'mhc-weights')
    for key, value in plain.items():
        assert torch.equal(value, sharded[key]), key
        assert not torch.equal(value, before[key]), key
