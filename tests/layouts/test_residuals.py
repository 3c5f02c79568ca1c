"""Residuals beside HC and mHC in parallel layouts and schedules: what one process computes.

The work is done by ``worker.py``, one launch per world size, as in ``test_layouts.py``.
"""

from __future__ import annotations

import pytest
import torch
from layout_cases import (
    MIXERS,
    MOE,
    OWN_NORM_TOLERANCE,
    SPLIT_SUM_TOLERANCE,
    assert_stepped_alike,
    launch,
)

RMS = {'normalization': 'RMSNorm'}
LOCAL_STACK = {'is_hybrid_model': True, 'transformer_impl': 'local'}
MIXED = {'layers': 6, 'pattern': 'MMG*-G', 'activation': 'silu'}
FULL = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 2}
PP2, VPP2, SP = {'pp': 2}, {'pp': 2, 'vpp': 2}, {'tp': 2, 'sp': True}
EVEN, UNEVEN = ({'pipeline_model_parallel_layout': x} for x in ('Et|t|t|tL', 'Ett||t|tL'))
# Stages of the embedding and of the loss alone.
ENDS = {'pipeline_model_parallel_layout': 'E|tt|tt|L'}
FREED = {'deallocate_pipeline_outputs': True}
ONE_LAYER = {**FULL, 'recompute_method': 'block', 'recompute_num_layers': 1}
MTP = {'mtp_num_layers': 1, 'apply_rope_fusion': False}

GATED = {'residual_type': 'gated', 'gated_rank': 3}
ATTENTION = {'residual_type': 'attention', 'attention_block_size': 3}
MODELS = {
    'attention': {'residual': ATTENTION},
    'attention-moe': {'residual': ATTENTION, 'config': MOE},
    'attention-mtp': {'residual': ATTENTION, 'config': MTP},
    'attention-mixers': {'residual': ATTENTION, **MIXED, 'config': {**LOCAL_STACK, **MIXERS}},
    'gated': {'residual': GATED, 'config': RMS},
    'gated-moe': {'residual': GATED, 'config': {**RMS, **MOE}},
    'gated-mtp': {'residual': GATED, 'config': {**RMS, **MTP}},
    'gated-mixers': {'residual': GATED, **MIXED, 'config': {**RMS, **LOCAL_STACK, **MIXERS}},
}
REBUILT = {'residual': {**GATED, 'recompute_layer_num': 3}}


def on_v(schedule: str, **changes) -> dict:
    config = {**EVEN, **changes.pop('config', {})}
    return {'layout': VPP2, 'schedule': {'schedule': schedule}, 'config': config, **changes}


# name, model, world, what is different from one process, whether bit for bit
CASES = [
    ('full', 'gated', 1, {'config': FULL}, True),
    ('pp2-vpp2-blocks', 'gated', 2, {'layout': VPP2, 'config': UNEVEN, **REBUILT}, True),
    ('v', 'gated', 2, on_v('dualpipev-w', post_stream='high'), True),
    ('tp2-sp', 'gated', 2, {'layout': SP}, False),
    ('ep2', 'gated-moe', 2, {'layout': {'ep': 2}}, False),
    ('pp2', 'gated-mtp', 2, {'layout': PP2}, False),
    ('pp2', 'gated-mixers', 2, {'layout': PP2, 'pattern': 'MM|G*-G'}, True),
    ('full', 'attention', 1, {'config': FULL}, True),
    ('pp2-one-layer', 'attention', 2, {'layout': PP2, 'config': ONE_LAYER}, True),
    ('pp2-vpp2', 'attention', 2, {'layout': VPP2, 'config': {**ENDS, **FREED}}, True),
    ('v', 'attention', 2, on_v('dualpipev-w', config=UNEVEN), True),
    ('tp2-sp', 'attention', 2, {'layout': SP}, False),
    ('ep2', 'attention-moe', 2, {'layout': {'ep': 2}}, False),
    ('pp2', 'attention-mtp', 2, {'layout': PP2}, False),
    ('pp2', 'attention-mixers', 2, {'layout': PP2, 'pattern': 'MM|G*-G'}, True),
]
# Trained a step with each optimizer.
STEPPED = ('gated',)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('residuals')
    by_world: dict[int, list[dict]] = {1: [], 2: []}
    for model, base in MODELS.items():
        first = {'weights': f'{model}-weights', **base}
        by_world[1].append({**first, 'name': f'{model}-alone', 'reference': True})
    for name, model, world, changes, _ in CASES:
        config = {**MODELS[model].get('config', {}), **changes.get('config', {})}
        case = {'weights': f'{model}-weights', **MODELS[model], **changes, 'config': config}
        by_world[world].append({**case, 'name': f'{name}-{model}'})
    for model in STEPPED:
        for kind in ('plain', 'dist'):
            case = {'weights': f'{model}-weights', **MODELS[model], 'step': kind}
            by_world[2].append({**case, 'microbatches': 2, 'name': f'{kind}-step-{model}'})
    losses = {}
    for world, cases in by_world.items():
        losses.update(launch(world, cases, folder))
    return folder, losses


@pytest.mark.parametrize(
    ('name', 'model', 'bitwise'),
    [pytest.param(c[0], c[1], c[4], id=f'{c[0]}-{c[1]}') for c in CASES],
)
def test_layout_equals_one_process(runs, tensors, name, model, bitwise):
    folder, results = runs
    case, reference = f'{name}-{model}', f'{model}-alone'
    got, wanted = (
        sorted(loss for rank in results[which]['losses'] for loss in rank)
        for which in (case, reference)
    )
    assert got == (wanted if bitwise else pytest.approx(wanted, rel=SPLIT_SUM_TOLERANCE))
    gradients, references = tensors(folder / case), tensors(folder / reference)
    assert gradients.keys() == references.keys()
    whole = torch.stack([gradient.norm() for gradient in references.values()]).norm()
    for key, gradient in references.items():
        # Comparing zeros with zeros would prove nothing.
        assert gradient.abs().max() > 1e-8 or not _learns(key), key
        if bitwise:
            assert torch.equal(gradients[key], gradient), key
        error = (gradients[key] - gradient).norm()
        assert error <= SPLIT_SUM_TOLERANCE * whole, (key, error / whole)
        assert error <= OWN_NORM_TOLERANCE * gradient.norm(), key


def _learns(key: str) -> bool:
    """Whether it is of a topology; the first read of Attention Residuals has one source."""
    first = 'layers.0.' in key and key.endswith('query')
    return ('hyper_connection' in key or 'stream_merge' in key) and not first


@pytest.mark.parametrize('model', STEPPED)
def test_distributed_optimizer_steps_as_the_plain_one(runs, tensors, model):
    assert_stepped_alike(runs[0], tensors, model)
