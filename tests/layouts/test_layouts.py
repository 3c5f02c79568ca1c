"""Loss and gradients of every topology are the same in every parallel layout as in one process.

The work is done by ``layouts/worker.py`` under torchrun, one launch per world size, since importing
Megatron costs seconds per process. Pipeline and data parallelism only move whole operations, so
they must agree bit for bit; tensor, sequence and expert parallelism split sums.
"""

from __future__ import annotations

import pathlib

import pytest
import torch
from layout_cases import (
    MIXERS,
    MOE,
    MOST_THREADS,
    OWN_NORM_TOLERANCE,
    SPARSE,
    SPLIT_SUM_TOLERANCE,
    assert_stepped_alike,
    launch,
)

MHC = {'residual_type': 'mhc', 'init': 'identity'}
HC = {'residual_type': 'hc'}
SINGLE = {**MHC, 'single_pass': True}
HEAD = {'residual_type': 'mhc', 'num_residual_streams': 3, 'stream_merge': 'learned'}
FIXED = {'residual_type': 'mhc', 'fixed_mappings': ['pre', 'post', 'res']}
FULL = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 2}
CORE = {'recompute_granularity': 'selective', 'recompute_modules': ['core_attn']}
BLOCKS = {name: {**MHC, 'recompute_layer_num': name} for name in (1, 3, 'auto')}
ROTATING_BLOCKS = {**MHC, 'manifold': 'orthogonal', 'recompute_layer_num': 3}
NORM = {'recompute_granularity': 'selective', 'recompute_modules': ['layernorm']}
ONE_LAYER = {
    'recompute_granularity': 'full',
    'recompute_method': 'block',
    'recompute_num_layers': 1,
}
PP2_FULL, VPP2 = {'layout': {'pp': 2}, 'config': FULL}, {'pp': 2, 'vpp': 2}

# Modules that a residual topology adds to a model.
OWN = ('hyper_connection', 'stream_merge', 'dense_aggregates', '.engram.')
MTP = {'mtp_num_layers': 1, 'apply_rope_fusion': False}
# 32 tokens: with sequence parallelism 16 a rank, of which the convolution reads 9 from the other.
ENGRAM = {'layers': (2, 4), 'heads': 2, 'table_size': 50, 'dim': 16}
# Prediction layers in another chunk of the rank that has the embedding. Shapes are negotiated, in
# one direction at a time where both neighbours of a stage are the same rank.
MTP_ALONE = {
    'layout': VPP2,
    'config': {'pipeline_model_parallel_layout': 'Ett|tt|m|L', 'overlap_p2p_comm': True},
    'embedding_ranks': [0],
}
# Stages that Megatron lets be: one that holds nothing, and one of the loss alone.
EMPTY = {'layout': VPP2, 'config': {'pipeline_model_parallel_layout': 'Ett||tt|L'}}
FREED = {'deallocate_pipeline_outputs': True}
MTP_LAST = {'pipeline_model_parallel_layout': 'Et|tt|t|mL'}
# Prediction layers are recomputed one by one or not at all.
RECOMPUTED_MTP = {**MTP_LAST, **FULL, 'recompute_num_layers': 1}

# Hybrid models of local layers; ``|`` ends a stage, at any layer.
LOCAL_STACK = {'is_hybrid_model': True, 'transformer_impl': 'local'}
HYBRID = {'layers': 8, 'pattern': '*-*-*-*-', 'config': LOCAL_STACK}
MIXED = {
    'layers': 6,
    'pattern': 'MMG*-G',
    'activation': 'silu',
    'config': {**LOCAL_STACK, **MIXERS},
}
HYBRID_MOE = {'layers': 8, 'pattern': '*-*E*E*-', 'config': {**MOE, **LOCAL_STACK}}

HYBRID_MTP = {'layers': 8, 'pattern': '*-*-*-*-/*-', 'config': {**MTP, **LOCAL_STACK}}

# model -> what distinguishes it
MODELS = {
    'mhc': {'residual': MHC},
    'hc': {'residual': HC},
    'head': {'residual': HEAD},
    'tied': {'residual': MHC, 'tied': True},
    'moe': {'residual': MHC, 'config': MOE},
    'fixed': {'residual': FIXED},
    'rotating': {'residual': {**MHC, 'manifold': 'orthogonal'}},
    'single': {'residual': SINGLE},
    'single-mtp': {'residual': SINGLE, 'config': MTP},
    # RMSNorm, since one vector more on every key changes no softmax: its gradient is 0.
    'mudd': {'residual': {'residual_type': 'mudd'}, 'config': {'normalization': 'RMSNorm'}},
    'engram-standard': {'engram': ENGRAM},
    'engram': {'engram': ENGRAM, 'residual': MHC},
    'engram-moe': {'engram': ENGRAM, 'residual': MHC, 'config': MOE},
    'hybrid': {'residual': MHC, **HYBRID},
    'hybrid-hc': {'residual': HC, **HYBRID},
    'hybrid-moe': {'residual': MHC, **HYBRID_MOE},
    'hybrid-engram': {'engram': ENGRAM, 'residual': MHC, **HYBRID},
    'hybrid-mudd': {
        'residual': {'residual_type': 'mudd'},
        **HYBRID,
        'config': {'normalization': 'RMSNorm', **LOCAL_STACK},
    },
    'hybrid-mtp': {'residual': MHC, **HYBRID_MTP, 'tied': True},
    'mixers': {'residual': MHC, **MIXED},
    'sparse': {
        'residual': MHC,
        'layers': 4,
        'pattern': 'D-D-',
        'config': {**LOCAL_STACK, **SPARSE},
    },
    'mamba': {'residual': HC, **MIXED, 'layers': 3, 'pattern': 'M-M'},
    'hybrid-mtp-untied': {'residual': HC, **HYBRID_MTP},
    'mtp': {'residual': MHC, 'config': MTP},
    'mtp-tied': {'residual': MHC, 'config': MTP, 'tied': True},
}
# (case, model, world, changes, bitwise). The reference of a case is its model in one process on the
# same microbatches.
CASES = [
    ('full', 'mhc', 1, {'config': FULL}, True),
    ('core', 'mhc', 1, {'config': CORE}, True),
    ('core-blocks', 'mhc', 1, {'config': CORE, 'residual': BLOCKS['auto']}, True),
    ('norm', 'hc', 1, {'config': NORM}, True),
    ('pp2', 'mhc', 2, {'layout': {'pp': 2}}, True),
    ('pp2', 'hc', 2, {'layout': {'pp': 2}}, True),
    ('pp2', 'head', 2, {'layout': {'pp': 2}}, True),
    ('pp2', 'tied', 2, {'layout': {'pp': 2}}, False),
    ('pp2-vpp2', 'tied', 2, {'layout': VPP2}, False),
    ('pp2-full', 'mhc', 2, PP2_FULL, True),
    ('pp2-vpp2', 'mhc', 2, {'layout': {'pp': 2, 'vpp': 2}}, True),
    ('pp2-vpp2-empty', 'mhc', 2, EMPTY, True),
    ('pp2-vpp2', 'hc', 2, {'layout': {'pp': 2, 'vpp': 2}}, True),
    # Blocks of sublayers under the stock schedules; the first is 3 of the 4 in a stage.
    ('pp2-blocks-3', 'mhc', 2, {'layout': {'pp': 2}, 'residual': BLOCKS[3]}, True),
    ('pp2-vpp2-blocks-1', 'mhc', 2, {'layout': VPP2, 'residual': BLOCKS[1]}, True),
    ('pp2-full-blocks', 'mhc', 2, {**PP2_FULL, 'residual': BLOCKS[3]}, True),
    ('pp2-vpp2-blocks', 'rotating', 2, {'layout': VPP2, 'residual': ROTATING_BLOCKS}, True),
    ('tp2-sp', 'rotating', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('core', 'single', 1, {'config': CORE}, True),
    ('tp2-sp', 'single', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('dp2-overlap', 'single', 2, {'microbatches': 2, 'overlap': True}, True),
    # H_pre crosses from stage to stage, and from one recomputed layer to the next.
    ('full', 'single', 1, {'config': FULL}, True),
    ('pp2-vpp2-empty', 'single', 2, {**EMPTY, 'config': {**EMPTY['config'], **FREED}}, True),
    ('pp2-one-layer', 'single', 2, {'layout': {'pp': 2}, 'config': ONE_LAYER}, True),
    ('pp4', 'single', 4, {'layout': {'pp': 4}, 'config': FREED}, True),
    ('pp2-tp2-sp', 'single', 4, {'layout': {'pp': 2, 'tp': 2, 'sp': True}}, False),
    ('pp4-mtp-last', 'single-mtp', 4, {'layout': {'pp': 4}, 'config': RECOMPUTED_MTP}, False),
    ('dp2', 'mhc', 2, {'microbatches': 2}, True),
    ('dp2', 'hc', 2, {'microbatches': 2}, True),
    ('dp2-overlap', 'fixed', 2, {'microbatches': 2, 'overlap': True}, True),
    ('tp2', 'mhc', 2, {'layout': {'tp': 2}}, False),
    ('tp2-sp', 'mhc', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('tp2-sp', 'hc', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('tp2-sp', 'head', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('tp2', 'mudd', 2, {'layout': {'tp': 2}}, False),
    ('tp2-sp', 'mudd', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('dp2-overlap', 'mudd', 2, {'microbatches': 2, 'overlap': True}, True),
    # Tables are written by one process and read by ranks, whose gradients are read whole again.
    ('dp2', 'engram', 2, {'microbatches': 2}, True),
    ('pp2', 'engram', 2, {'layout': {'pp': 2}}, True),
    ('pp2', 'engram-standard', 2, {'layout': {'pp': 2}}, True),
    # One layer before the last stage, which has one too.
    ('pp2-vpp2', 'engram', 2, {'layout': VPP2}, True),
    ('pp2-vpp2-empty', 'engram-standard', 2, EMPTY, True),
    ('pp2-tp2-sp', 'engram', 4, {'layout': {'pp': 2, 'tp': 2, 'sp': True}}, False),
    ('tp2', 'engram-standard', 2, {'layout': {'tp': 2}}, False),
    ('tp2-sp', 'engram', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    # Tables shared as experts are, also by ranks of both kinds.
    ('ep2', 'engram-moe', 2, {'layout': {'ep': 2}, 'microbatches': 2}, False),
    ('tp2-sp-ep4', 'engram-moe', 4, {'layout': {'tp': 2, 'sp': True, 'ep': 4}}, False),
    ('pp2-ep2', 'engram-moe', 4, {'layout': {'pp': 2, 'ep': 2}}, False),
    ('ep2', 'moe', 2, {'layout': {'ep': 2}, 'microbatches': 2}, False),
    ('pp2', 'hybrid', 2, {'layout': {'pp': 2}, 'pattern': '*-*-*|-*-'}, True),
    ('pp2-vpp2', 'hybrid-hc', 2, {'layout': VPP2, 'pattern': '*-*|-|*-*|-'}, True),
    ('pp2-vpp2', 'hybrid-moe', 2, {'layout': VPP2, 'pattern': '*-*|E|*E*|-'}, True),
    ('dp2-overlap', 'hybrid', 2, {'microbatches': 2, 'overlap': True}, True),
    ('tp2', 'hybrid-hc', 2, {'layout': {'tp': 2}}, False),
    ('tp2-sp', 'hybrid', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('ep2', 'hybrid-moe', 2, {'layout': {'ep': 2}, 'microbatches': 2}, False),
    ('pp2', 'hybrid-engram', 2, {'layout': {'pp': 2}, 'pattern': '*-*|-*-*-'}, True),
    ('tp2-sp', 'hybrid-engram', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('tp2-sp', 'hybrid-mudd', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    ('pp2', 'hybrid-mtp', 2, {'layout': {'pp': 2}, 'pattern': '*-*-*|-*-/*-'}, False),
    ('pp2-vpp2', 'hybrid-mtp', 2, {'layout': VPP2, 'pattern': '*-*|-|*-*|-/*-'}, False),
    ('tp2-sp', 'hybrid-mtp', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    # A stage of Mamba layers alone.
    ('pp2', 'mixers', 2, {'layout': {'pp': 2}, 'pattern': 'MM|G*-G'}, True),
    ('pp2-vpp2', 'mixers', 2, {'layout': VPP2, 'pattern': 'M|MG|*-|G'}, True),
    ('full', 'mixers', 1, {'config': FULL}, True),
    ('pp2', 'sparse', 2, {'layout': {'pp': 2}, 'pattern': 'D-D|-'}, True),
    ('tp2', 'mamba', 2, {'layout': {'tp': 2}}, False),
    ('tp2-sp', 'mixers', 2, {'layout': {'tp': 2, 'sp': True}}, False),
    # The last stage has no layer but that of the prediction, and gets n streams all the same.
    ('pp2-vpp2', 'hybrid-mtp-untied', 2, {'layout': VPP2, 'pattern': '*-*|-|*-*-|/*-'}, False),
    ('pp2', 'mtp', 2, {'layout': {'pp': 2}}, False),
    ('pp2', 'mtp-tied', 2, {'layout': {'pp': 2}}, False),
    ('pp2-vpp2-alone', 'mtp', 2, MTP_ALONE, False),
    ('pp4', 'mhc', 4, {'layout': {'pp': 4}}, True),
    # The final norm lies before the last stage, so the last edge is one stream wide.
    ('pp4-mtp-last', 'mtp', 4, {'layout': {'pp': 4}, 'config': MTP_LAST}, False),
    ('pp4', 'hc', 4, {'layout': {'pp': 4}}, True),
    ('pp2-tp2', 'mhc', 4, {'layout': {'pp': 2, 'tp': 2}}, False),
    ('pp2-tp2-sp', 'hc', 4, {'layout': {'pp': 2, 'tp': 2, 'sp': True}}, False),
    ('pp2-ep2', 'moe', 4, {'layout': {'pp': 2, 'ep': 2}}, False),
    ('pp2-vpp2-dp2', 'mhc', 4, {'layout': {'pp': 2, 'vpp': 2}}, False),
]
# Trained a step with each optimizer.
STEPPED = ('mhc', 'hc', 'engram', 'hybrid', 'mixers')


def of_first_h_res(key: str) -> bool:
    """Whether the gradient is 0 but for rounding: equal streams enter the first sublayer.

    Only a hybrid model has the layers apart in its checkpoint.
    """
    return '.layers.0.' in key and key.endswith('_res')


def reference_name(model: str, changes: dict) -> str:
    return f'{model}-reference-{changes.get("microbatches", 4)}'


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp('layouts')
    by_world: dict[int, list[dict]] = {1: [], 2: [], 4: []}
    for model, base in MODELS.items():
        first = {'weights': f'{model}-weights', **base}
        by_world[1].append({**first, 'name': reference_name(model, {}), 'reference': True})
        by_world[1].append(
            {**first, 'name': reference_name(model, {'microbatches': 2}), 'microbatches': 2}
        )
    for name, model, world, changes, _ in CASES:
        case = {'weights': f'{model}-weights', **MODELS[model], **changes}
        case['config'] = {**MODELS[model].get('config', {}), **changes.get('config', {})}
        by_world[world].append({**case, 'name': f'{name}-{model}'})
    for model in STEPPED:
        for kind in ('plain', 'dist'):
            by_world[2].append(
                {
                    'weights': f'{model}-weights',
                    **MODELS[model],
                    'microbatches': 2,
                    'step': kind,
                    'name': f'{kind}-step-{model}',
                }
            )
    by_world[2].append(
        {
            'weights': 'mtp-weights',
            **MODELS['mtp'],
            **MTP_ALONE,
            'config': {**MTP, **MTP_ALONE['config']},
            'step': 'dist',
            'name': 'step-alone',
        }
    )
    for name, layout in (('eval-pp2', {'pp': 2}), ('eval-pp2-vpp2', {'pp': 2, 'vpp': 2})):
        by_world[2].append(
            {
                'weights': 'mhc-weights',
                **MODELS['mhc'],
                'layout': layout,
                'forward_only': True,
                'name': name,
            }
        )
    losses = {}
    for world, cases in by_world.items():
        losses.update(launch(world, cases, folder))
    return folder, losses


@pytest.mark.parametrize(
    ('name', 'model', 'changes', 'bitwise'),
    [pytest.param(c[0], c[1], c[3], c[4], id=f'{c[0]}-{c[1]}') for c in CASES],
)
def test_layout_equals_one_process(runs, tensors, name, model, changes, bitwise):
    folder, losses = runs
    case, reference = f'{name}-{model}', reference_name(model, changes)
    got = sorted(loss for rank in losses[case]['losses'] for loss in rank)
    wanted = sorted(loss for rank in losses[reference]['losses'] for loss in rank)
    assert got == (wanted if bitwise else pytest.approx(wanted, rel=SPLIT_SUM_TOLERANCE))
    # Clipping: what is replicated counts once, what is split counts whole.
    norms = [losses[name]['grad_norm'] for name in (case, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=SPLIT_SUM_TOLERANCE)
    gradients, references = tensors(folder / case), tensors(folder / reference)
    assert gradients.keys() == references.keys()
    own = [key for key in gradients if any(name in key for name in OWN)]
    assert bool(own) == (model != 'fixed')
    whole = torch.stack([gradient.norm() for gradient in references.values()]).norm()
    for key, reference_gradient in references.items():
        if bitwise:
            assert torch.equal(gradients[key], reference_gradient), key
        error = (gradients[key] - reference_gradient).norm()
        assert error <= SPLIT_SUM_TOLERANCE * whole, (key, error / whole)
        if not of_first_h_res(key):
            assert error <= OWN_NORM_TOLERANCE * reference_gradient.norm(), key


def test_no_case_leaves_threads_to_the_next(runs):
    """Each group keeps three that wake for ever; hundreds starve the ranks."""
    left = {name: result['threads'] for name, result in runs[1].items()}
    assert max(left.values()) <= MOST_THREADS, left


@pytest.mark.parametrize('name', ['eval-pp2', 'eval-pp2-vpp2'])
def test_forward_only_equals_training_losses(runs, name):
    _, losses = runs
    flat = [loss for rank in losses[name]['losses'] for loss in rank]
    assert flat == losses[reference_name('mhc', {})]['losses'][0]


@pytest.mark.parametrize('model', STEPPED)
def test_distributed_optimizer_steps_as_the_plain_one(runs, tensors, model):
    assert_stepped_alike(runs[0], tensors, model)


def test_copies_of_the_embedding_on_one_rank_stay_equal(runs, tensors):
    """Rank 0 has both; the checkpoint has one of them."""
    folder, losses = runs
    assert losses['step-alone']['equal_copies']
    key = next(k for k in tensors(folder / 'step-alone') if k.endswith('word_embeddings.weight'))
    stepped, before = (tensors(folder / name)[key] for name in ('step-alone', 'mtp-weights'))
    assert not torch.equal(stepped, before)


def test_mapping_parameters_get_gradients(runs, tensors):
    """A layout test that compares zeros with zeros would prove nothing."""
    folder, _ = runs
    for model in ('mhc', 'hc', 'head', 'moe', 'single', 'mudd', 'engram', 'hybrid', 'mixers'):
        for key, gradient in tensors(folder / reference_name(model, {})).items():
            if any(name in key for name in OWN) and not of_first_h_res(key):
                assert gradient.abs().max() > 1e-8, (model, key)
