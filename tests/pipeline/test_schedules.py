"""Models under schedules run from plans: losses and gradients of no pipeline, bit for bit.

The work is done by ``layouts/worker.py``, one launch per world size: importing Megatron costs
seconds per process.
"""

from __future__ import annotations

import pytest
import torch
from layout_cases import MIXERS, MOE, MOST_THREADS, OWN_NORM_TOLERANCE, SPLIT_SUM_TOLERANCE, launch

from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.mirrored import doubled
from megatron_mhc.schedules.validator import live_activations

MHC = {'residual_type': 'mhc', 'init': 'identity'}
SCHEDULES = ('zb-v', 'dualpipev', 'dualpipev-w')
HIDDEN = '1f1b-overlap'
SINGLE = {**MHC, 'single_pass': True}
ENGRAM = {'layers': (2, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
MIXED, DEEP = ('standard', 'mhc'), ('deep', 'deep-mhc')
MTP = {'mtp_num_layers': 1, 'apply_rope_fusion': False}
HC = {'residual_type': 'hc'}
# Hybrid models of local layers.
LOCAL = {'is_hybrid_model': True, 'transformer_impl': 'local', **MIXERS}
STACK = {**MOE, **LOCAL}
MIXED_LAYERS = {'layers': 8, 'pattern': '*-M*E-EM', 'config': STACK}
# Stages of attention, MLP and Mamba alone beside longer ones; and one of the loss alone.
UNEVEN, LOSS_ALONE = '*|-|M*E-E|M', '*-M*|E-|EM|'
# A prediction layer behind a layer of the last stage, and in a stage of its own.
BEFORE, ALONE_BEHIND = '*|-M|*|E-/*E', '*-|M*|E-|/*E'

PREDICTED = {'layers': 6, 'pattern': '*-M*E-/*E', 'config': {**STACK, **MTP}}

TIED = ('tied', 'mtp', 'mtp-tied')
HYBRIDS = ('standard', 'hc', 'mhc', 'mamba', 'local', 'mtp-standard', 'engram', *TIED)

# model -> what distinguishes it
MODELS = {
    'standard': {},
    'mhc': {'residual': MHC},
    'hc': {'residual': HC},
    'single': {'residual': SINGLE},
    'deep': {'layers': 8},
    'deep-mhc': {'residual': MHC, 'layers': 8},
    'odd': {'residual': MHC, 'layers': 6},
    'tied': {'residual': MHC, 'tied': True},
    'mtp': {'residual': MHC, 'config': MTP},
    'mtp-tied': {'residual': MHC, 'config': MTP, 'tied': True},
    'moe': {'residual': MHC, 'config': MOE},
    'engram': {'residual': MHC, 'engram': ENGRAM},
    'engram-moe': {'engram': ENGRAM, 'config': MOE},
    'hybrid-standard': MIXED_LAYERS,
    'hybrid-hc': {'residual': HC, **MIXED_LAYERS},
    'hybrid-mhc': {'residual': MHC, **MIXED_LAYERS},
    'hybrid-single': {'residual': SINGLE, **MIXED_LAYERS},
    'hybrid-tied': {'residual': MHC, 'layers': 4, 'pattern': '*-M-', 'tied': True, 'config': LOCAL},
    'hybrid-local': {'residual': MHC, 'layers': 6, 'pattern': '*-*E*E', 'config': STACK},
    'hybrid-mtp': {'residual': MHC, **PREDICTED},
    'hybrid-mtp-tied': {'residual': HC, **PREDICTED, 'tied': True},
    'hybrid-mtp-standard': PREDICTED,
    'hybrid-engram': {'engram': ENGRAM, 'layers': 4, 'pattern': '*-M-', 'config': LOCAL},
    'hybrid-mamba': {'residual': HC, 'layers': 6, 'pattern': 'MMMMMM', 'config': LOCAL},
}
EVEN_4 = 'Et|t|t|tL'
EVEN_8 = 'Et|t|t|t|t|t|t|tL'


V2, V4 = {'pp': 2, 'vpp': 2}, {'pp': 4, 'vpp': 2}
ODD = 'Et|tt|tt|tL'
MTP_LAST = 'Et|t|tt|mL'
# Stages that Megatron lets be: one that holds nothing, and one of the loss alone.
EMPTY = 'Ett||tt|L'
OVERLAP = {'overlap': True}
TP, SP, EP = {'tp': 2}, {'tp': 2, 'sp': True}, {'ep': 2}
HIGH = {'post_stream': 'high'}


def rebuilt(blocks, **residual):
    return {'residual': {**residual, 'recompute_layer_num': blocks, 'recompute_stream': 'high'}}


FULL = {
    'recompute_granularity': 'full',
    'recompute_method': 'uniform',
    'recompute_num_layers': 1,
}
REBUILT = rebuilt('stage', **MHC)
DIST, PLAIN, EVAL = {'step': 'dist'}, {'step': 'plain'}, {'forward_only': True}

# What a case is compared with: the same model without pipeline parallelism, as a rule in one
# process. (name, model, world, microbatches over all replicas, changes)
ALONE = [
    *((f'{model}-4', model, 1, 4, {}) for model in ('standard', 'mhc', 'hc', *TIED)),
    *((f'{model}-8', model, 1, 8, {}) for model in ('standard', 'mhc', 'deep', 'deep-mhc')),
    *((f'{model}-12', model, 1, 12, {}) for model in ('deep', 'deep-mhc')),
    ('mhc-3', 'mhc', 1, 3, {}),
    ('single-4', 'single', 1, 4, {}),
    ('hybrid-single-4', 'hybrid-single', 1, 4, {}),
    ('deep-2', 'deep', 1, 2, {}),
    ('odd-5', 'odd', 1, 5, {}),
    ('moe-4', 'moe', 1, 4, {}),
    ('engram-4', 'engram', 1, 4, {}),
    ('engram-moe-ep2', 'engram-moe', 2, 8, {'layout': EP}),
    ('mhc-dp2', 'mhc', 2, 8, {}),
    ('standard-dp2', 'standard', 2, 8, {}),
    ('moe-dp2', 'moe', 2, 8, {}),
    ('tied-dp2', 'tied', 2, 8, {}),
    ('mhc-dp4', 'mhc', 4, 16, {}),
    ('mhc-tp2-sp-dp2', 'mhc', 4, 8, {'layout': SP}),
    ('mhc-tp2-sp', 'mhc', 2, 4, {'layout': SP}),
    ('standard-tp2', 'standard', 2, 4, {'layout': TP}),
    ('moe-ep2', 'moe', 2, 8, {'layout': EP}),
    ('mhc-step', 'mhc', 2, 8, PLAIN),
    *((f'hybrid-{model}-4', f'hybrid-{model}', 1, 4, {}) for model in HYBRIDS),
    ('hybrid-mhc-3', 'hybrid-mhc', 1, 3, {}),
    ('hybrid-mhc-8', 'hybrid-mhc', 1, 8, {}),
    ('hybrid-tp2-sp', 'hybrid-local', 2, 4, {'layout': SP}),
    ('hybrid-ep2', 'hybrid-local', 2, 8, {'layout': EP}),
    ('hybrid-step', 'hybrid-mhc', 2, 8, PLAIN),
]

MICROBATCHES = {name: microbatches for name, _, _, microbatches, _ in ALONE}


def on_v(name: str, reference: str, world: int, schedule: str, layout: str = '', **changes):
    """A case: name, reference, world, changes; ``layout`` has the layers of each stage."""
    pp = 4 if world == 4 and 'deep' in reference else 2
    layout = layout or (EVEN_8 if pp == 4 else EVEN_4)
    case = {'config': {'pipeline_model_parallel_layout': layout, **changes.pop('config', {})}}
    return placed(name, reference, world, schedule, pp, case | changes)


def in_pattern(name: str, reference: str, world: int, schedule: str, pattern: str, **changes):
    """The same of a hybrid model, whose pattern says it."""
    pp = pattern.count('|') // 2 + 1
    case = {'pattern': pattern, 'config': {}}
    return placed(name, f'hybrid-{reference}', world, schedule, pp, case | changes)


def on_line(name: str, reference: str, world: int, pp: int = 2, schedule: str = 'zb-h1', **changes):
    """One chunk a rank, where Megatron has it for 1F1B."""
    case = {'config': {}, 'parallel': {'vpp': None}, **changes}
    return placed(name, reference, world, schedule, pp, case)


def copies(name: str, reference: str, world: int, pp: int = 2, **changes):
    """Two copies of the model: one stage of each on a rank."""
    layout = doubled(EVEN_4 if pp == 4 else 'Ett|ttL')
    config = {'pipeline_model_parallel_layout': layout, **changes.pop('config', {})}
    return placed(name, reference, world, 'dualpipe', pp, {'config': config, **changes})


def stock(reference: str, pp: int):
    """Megatron's own 1F1B, which the plans on a line are put beside."""
    return f'1f1b-{pp}', reference, pp, {'layout': {'pp': pp}, 'config': {}}


def combined(name: str, layout: dict, reference: str = 'moe-ep2', **changes):
    """Stock schedules that run a forward and a backward at once; experts on two ranks."""
    case = {'layout': {**layout, **EP}, 'combined': True, 'config': {}}
    return name, reference, 4 if layout else 2, {**case, **changes}


def placed(name: str, reference: str, world: int, schedule: str, pp: int, case: dict):
    parallel = {**(V4 if pp == 4 else V2), **case.pop('parallel', {})}
    settings = {'schedule': schedule, **case.pop('settings', {})}
    case = {'layout': parallel, 'schedule': settings, **case}
    return f'{schedule}-{name}', reference, world, case


# Less in flight; the bound on four ranks is in whole ranks and lies between two of what there is.
BOUNDED = [
    *(on_v('2', 'mhc-4', 2, schedule) for schedule in ('v-half', 'v-bound')),
    on_v('4', 'deep-12', 4, 'v-half'),
    on_v('4', 'deep-mhc-12', 4, 'v-min'),
    on_v('4', 'deep-mhc-12', 4, 'v-bound', settings={'live_bound': 3.7}),
    on_line('2', 'mhc-4', 2),
    on_line('2-tp2', 'standard-tp2', 4, config={}, parallel={'vpp': None, **TP}),
    on_line('4', 'deep-mhc-12', 4, 4),
    on_line('moe', 'moe-4', 2),
    on_line('rebuilt', 'mhc-8', 2, **rebuilt('stage', **MHC)),
    on_line('dp2-overlap', 'mhc-dp2', 4, **OVERLAP),
    on_line('2', 'mhc-4', 2, schedule=HIDDEN),
    on_line('4', 'deep-mhc-12', 4, 4, HIDDEN),
    on_line('rebuilt-high', 'mhc-8', 2, schedule=HIDDEN, **REBUILT, **HIGH),
    on_line('dp2-overlap', 'mhc-dp2', 4, schedule=HIDDEN, **OVERLAP),
]
STOCK = [stock('mhc-4', 2), stock('deep-mhc-12', 4)]
MATRIX = [
    *(on_v(f'2-{m}-{r}', f'{r}-{m}', 2, s) for s in SCHEDULES for m in (4, 8) for r in MIXED),
    *(on_v(f'4-{m}-{r}', f'{r}-{m}', 4, s) for s in SCHEDULES for m in (8, 12) for r in DEEP),
]
HYBRID = [
    *(in_pattern('2', f'{r}-4', 2, s, UNEVEN) for s in SCHEDULES for r in HYBRIDS[:3]),
    *(in_pattern('high', f'{r}-4', 2, 'dualpipev-w', UNEVEN, **HIGH) for r in ('standard', 'mhc')),
    in_pattern('high', 'hc-4', 2, 'dualpipev', LOSS_ALONE, **HIGH),
    in_pattern('mamba', 'mamba-4', 2, 'dualpipev', 'M|MM|MM|M', **HIGH),
    in_pattern('few', 'mhc-3', 2, 'zb-v', LOSS_ALONE),
    in_pattern('verified', 'mhc-4', 2, 'dualpipev', LOSS_ALONE, settings={'verify_steps': 1}),
    in_pattern('rebuilt-high', 'mhc-4', 2, 'dualpipev-w', UNEVEN, **REBUILT, **HIGH),
    in_pattern('blocks-3', 'hc-4', 2, 'zb-v', LOSS_ALONE, **rebuilt(3, **HC)),
    in_pattern('4', 'mhc-8', 4, 'dualpipev-w', '*|-|M|*|E|-|E|M', **HIGH),
    in_pattern('tp2-sp', 'tp2-sp', 4, 'dualpipev', '*|-*|E*|E', parallel=SP),
    in_pattern('ep2', 'ep2', 4, 'dualpipev-w', '*-|*E|*|E', parallel=EP, **HIGH),
    in_pattern('step', 'step', 4, 'dualpipev', UNEVEN, **DIST),
    in_pattern('step-overlap', 'step', 4, 'zb-v', LOSS_ALONE, **DIST, **OVERLAP),
]
# Beside two data-parallel replicas of the model.
MIRRORED = [
    *(copies('2', f'{model}-dp2', 2) for model in (*MIXED, 'moe')),
    copies('4', 'mhc-dp2', 4, 4),
    copies('verified', 'standard-dp2', 2, settings={'verify_steps': 1}),
    copies('rebuilt-high', 'mhc-dp2', 2, **REBUILT, **HIGH),
    copies('full', 'mhc-dp2', 2, config=FULL),
    copies('tp2-sp', 'mhc-tp2-sp-dp2', 4, parallel=SP),
    copies('step', 'mhc-step', 2, **PLAIN),
    copies('step-4', 'mhc-step', 4, 4, **DIST, **OVERLAP),
]
BITWISE = [
    *STOCK,
    *MIRRORED,
    *MATRIX,
    *BOUNDED,
    on_line('hybrid', 'hybrid-mhc-4', 2, pattern='*-M*|E-EM'),
    # Token ids cross from stage to stage.
    on_line('2', 'engram-4', 2),
    *(on_v('2', 'engram-4', 2, schedule) for schedule in ('zb-v', 'v-half', 'v-min')),
    on_v('high', 'engram-4', 2, 'dualpipev', **HIGH),
    in_pattern('2', 'engram-4', 2, 'dualpipev-w', '*|-|M|-'),
    on_v('ep2', 'engram-moe-ep2', 4, 'dualpipev-w', parallel=EP),
    combined('combined', {}),
    combined('combined', V2, 'engram-moe-ep2'),
    combined('combined-interleaved', V2),
    combined('combined-p2p', V2, config={'overlap_p2p_comm': True}),
    *HYBRID,
    # Fewer microbatches than twice the ranks, and than ranks.
    on_v('few', 'mhc-3', 2, 'zb-v'),
    on_v('few', 'deep-2', 4, 'zb-v'),
    on_v('uneven', 'odd-5', 2, 'dualpipev-w', ODD),
    on_v('empty', 'mhc-4', 2, 'zb-v', EMPTY),
    on_v('hc', 'hc-4', 2, 'dualpipev'),
    # H_pre crosses from stage to stage, also those of one rank.
    on_v('2', 'single-4', 2, 'zb-v'),
    on_v('verified', 'single-4', 2, 'dualpipev', settings={'verify_steps': 1}),
    in_pattern('2', 'single-4', 2, 'dualpipev-w', UNEVEN),
    on_v('verified', 'mhc-4', 2, 'dualpipev', settings={'verify_steps': 1}),
    on_v('moe', 'moe-4', 2, 'dualpipev'),
    on_v('dp2', 'mhc-dp2', 4, 'dualpipev'),
    on_v('dp2-overlap', 'mhc-dp2', 4, 'dualpipev-w', **OVERLAP),
    on_v('dp2-overlap', 'standard-dp2', 4, 'zb-v', **OVERLAP),
    on_v('tp2', 'standard-tp2', 4, 'dualpipev', parallel=TP),
    on_v('tp2-sp', 'mhc-tp2-sp', 4, 'dualpipev-w', parallel=SP),
    on_v('ep2', 'moe-ep2', 4, 'dualpipev', parallel=EP),
    on_v('ep2', 'moe-ep2', 4, 'dualpipev-w', parallel=EP),
    # F_post,res on its own stream, and what the mHC kernels made rebuilt by the plan.
    *(on_v('high', f'{r}-4', 2, 'dualpipev', **HIGH) for r in ('standard', 'hc', 'moe')),
    on_v('high', 'mhc-8', 2, 'zb-v', **HIGH),
    on_v('rebuilt', 'mhc-8', 2, 'dualpipev-w', **rebuilt('stage', **MHC)),
    on_v('rebuilt', 'hc-4', 2, 'zb-v', **rebuilt('stage', residual_type='hc')),
    on_v('rebuilt-high', 'deep-mhc-8', 4, 'dualpipev-w', **rebuilt('stage', **MHC), **HIGH),
    on_v('rebuilt-high', 'moe-ep2', 4, 'dualpipev', parallel=EP, **rebuilt('stage', **MHC), **HIGH),
    # In segments of one sublayer, of which the plan rebuilds the last, and of three in four.
    on_v('blocks-1', 'mhc-4', 2, 'dualpipev-w', **rebuilt(1, **MHC), **HIGH),
    on_v('blocks-3', 'odd-5', 2, 'dualpipev-w', ODD, **rebuilt(3, **MHC)),
    on_v('blocks-auto', 'mhc-4', 2, 'zb-v', **rebuilt('auto', **MHC)),
    # The weights after an optimizer step.
    on_v('step', 'mhc-step', 4, 'dualpipev', **DIST),
    on_v('step-overlap', 'mhc-step', 4, 'zb-v', **DIST, **OVERLAP),
    on_v('gather', 'mhc-step', 4, 'v-min', **DIST, **OVERLAP, gather='apart'),
    on_v('gather-together', 'mhc-step', 4, 'dualpipev-w', **DIST, **OVERLAP, gather='together'),
    on_line('gather', 'mhc-step', 4, **DIST, **OVERLAP, gather='together'),
    # Layers that run again in their backward, which is split.
    on_v('full', 'mhc-4', 2, 'zb-v', config=FULL),
    on_v('full', 'moe-4', 2, 'dualpipev', config=FULL),
    on_v('full-blocks', 'mhc-8', 2, 'v-half', config=FULL, **REBUILT),
    on_line('full', 'mhc-4', 2, config=FULL),
]
# Two copies of a weight have their gradients summed at the end, one copy as they come.
CLOSE = [
    copies('tied', 'tied-dp2', 2),
    # Four replicas, summed in another order.
    copies('dp2-overlap', 'mhc-dp4', 4, **OVERLAP),
    on_v('tied', 'tied-4', 2, 'dualpipev-w'),
    on_line('tied-mtp', 'mtp-tied-4', 2),
    on_v('mtp', 'mtp-4', 2, 'dualpipev', 'Et|t|t|tmL'),
    on_v('mtp', 'mtp-tied-4', 2, 'dualpipev-w', 'Et|t|t|tmL'),
    # The final norm lies before the last stage, so the last edge is one stream wide.
    on_v('mtp-last', 'mtp-4', 2, 'zb-v', MTP_LAST),
    in_pattern('tied', 'tied-4', 2, 'dualpipev', '*|-|M|-'),
    *(in_pattern('2', f'{r}-4', 2, s, BEFORE) for s in SCHEDULES for r in TIED[1:]),
    in_pattern('high', 'mtp-4', 2, 'dualpipev-w', ALONE_BEHIND, **HIGH),
    in_pattern('alone', 'mtp-tied-4', 2, 'zb-v', ALONE_BEHIND),
    in_pattern('alone', 'mtp-standard-4', 2, 'dualpipev', ALONE_BEHIND),
]
# Models that nothing is loaded into: (name, world, what 1F1B is told, what a V is told instead).
INITIAL = [
    ('pp2', 2, {**MODELS['mhc']}, EVEN_4),
    ('pp2-experts', 2, {**MODELS['moe'], 'layers': 8}, 'Ett|tt|tt|ttL'),
    ('pp4', 4, MODELS['deep'], EVEN_8),
    ('pp2-copies', 2, {**MODELS['moe'], 'layers': 8}, doubled('Etttt|ttttL')),
    ('pp2-pattern', 2, {**MODELS['hybrid-mhc'], 'pattern': '*-M*|E-EM'}, '*-|M*|E-|EM'),
]
EVALUATIONS = [
    on_v('eval', 'mhc-4', 2, 'dualpipev', **EVAL),
    on_v('eval', 'deep-12', 4, 'zb-v', **EVAL),
    on_line('eval', 'mhc-4', 2, **EVAL),
    copies('eval', 'mhc-4', 2, **EVAL),
    in_pattern('eval', 'mhc-4', 2, 'dualpipev', UNEVEN, **EVAL, **HIGH),
]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('schedules')
    by_world: dict[int, list[dict]] = {1: [], 2: [], 4: []}
    known = {}
    for name, model, world, microbatches, changes in ALONE:
        # The first run of each model makes its weights.
        first = model not in {m for m, _ in known.values()}
        base = {'weights': f'{model}-weights', **MODELS[model], 'microbatches': microbatches}
        known[name] = model, base
        by_world[world].append({**base, **changes, 'name': name, 'reference': first})
    for name, reference, world, changes in BITWISE + CLOSE + EVALUATIONS:
        base = known[reference][1]
        config = {**base.get('config', {}), **changes['config']}
        by_world[world].append({**base, **changes, 'config': config, 'name': f'{name}-{reference}'})
    for name, world, case, stages in INITIAL:
        pp, config = 4 if name == 'pp4' else 2, case.get('config', {})
        case = {**case, 'initial': True}
        schedule = 'dualpipe' if name.endswith('copies') else 'v-half'
        v = {**case, 'layout': {'pp': pp, 'vpp': 2}, 'schedule': {'schedule': schedule}}
        if 'pattern' in case:
            v['pattern'] = stages
        else:
            v['config'] = {**config, 'pipeline_model_parallel_layout': stages}
        by_world[world].append({**case, 'name': f'{name}-line', 'layout': {'pp': pp}})
        by_world[world].append({**v, 'name': f'{name}-v'})
    results = {}
    for world, cases in by_world.items():
        results.update(launch(world, cases, folder))
    return folder, results


def losses(results: dict, case: str) -> list[float]:
    ranks = results[case]['losses']
    if case.startswith('dualpipe-'):
        # Both ends of the pipeline tell them all.
        ends = [rank for rank in ranks if rank]
        assert len(ends) % 2 == 0 and ends[: len(ends) // 2] == ends[len(ends) // 2 :]
        ranks = ends[len(ends) // 2 :]
    return sorted(loss for rank in ranks for loss in rank)


def ids(cases: list) -> list:
    return [
        pytest.param(name, reference, id=f'{name}-{reference}') for name, reference, *_ in cases
    ]


@pytest.mark.parametrize(('name', 'reference'), ids(BITWISE))
def test_bitwise_as_without_a_pipeline(runs, tensors, name, reference):
    folder, results = runs
    case = f'{name}-{reference}'
    assert losses(results, case) == losses(results, reference) != []
    assert results[case]['equal_copies']
    got, wanted = tensors(folder / case), tensors(folder / reference)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize(('name', 'reference'), ids(CLOSE))
def test_as_without_a_pipeline_but_for_the_order_of_sums(runs, tensors, name, reference):
    folder, results = runs
    case = f'{name}-{reference}'
    assert losses(results, case) == losses(results, reference)
    assert results[case]['equal_copies']
    got, wanted = tensors(folder / case), tensors(folder / reference)
    assert got.keys() == wanted.keys()
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for key, value in wanted.items():
        error = (got[key] - value).norm()
        assert error <= SPLIT_SUM_TOLERANCE * whole, (key, error / whole)
        assert error <= OWN_NORM_TOLERANCE * value.norm(), key


@pytest.mark.parametrize(('name', 'reference'), ids(EVALUATIONS))
def test_evaluation_has_the_losses_of_training(runs, name, reference):
    _, results = runs
    ranks = results[f'{name}-{reference}']['losses']
    told = ranks[-1:] if name.startswith('dualpipe-') else ranks
    assert [loss for rank in told for loss in rank] == results[reference]['losses'][0]


@pytest.mark.parametrize('name', [name for name, *_ in INITIAL])
def test_a_v_begins_with_the_weights_of_1f1b(runs, tensors, name):
    """And goes on with its random numbers."""
    folder, results = runs
    line, v = tensors(folder / f'{name}-line'), tensors(folder / f'{name}-v')
    assert line.keys() == v.keys()
    assert all(torch.equal(v[key], value) for key, value in line.items())
    assert len(set(results[f'{name}-v']['next'])) == len(results[f'{name}-v']['next'])
    assert results[f'{name}-v']['equal_copies']
    assert results[f'{name}-v']['next'] == results[f'{name}-line']['next']


@pytest.mark.parametrize(('name', 'reference'), ids(BOUNDED))
def test_what_stages_keep_is_what_the_plan_has_in_flight(runs, name, reference):
    """On every pipeline rank, at its peak."""
    result = runs[1][f'{name}-{reference}']
    case = next(case for one, other, _, case in BOUNDED if (one, other) == (name, reference))
    schedule, pp = case['schedule'], case['layout']['pp']
    m = MICROBATCHES[reference] // (2 if 'dp2' in name else 1)
    plan = make_plan(schedule['schedule'], pp, m, live_bound=schedule.get('live_bound'))
    in_flight = live_activations(plan)
    if case['layout']['vpp']:
        # The inverted V has the end of the model on its last rank.
        in_flight = in_flight[::-1]
    ranks_of_each = len(result['in_flight']) // pp
    assert result['in_flight'] == [n for n in in_flight for _ in range(ranks_of_each)]


@pytest.mark.parametrize(
    ('name', 'slots', 'layers'),
    [('combined', 3, 4), ('combined-interleaved', 3, 1), ('combined-p2p', 3, 1)],
)
def test_combined_passes_hand_over_where_experts_communicate(runs, name, slots, layers):
    """Dispatch and combine of every layer, in the forward and in the backward."""
    ran, handed = runs[1][f'{name}-moe-ep2']['lanes']
    assert (ran, handed) == (slots, slots * layers * 4)


def test_no_case_leaves_threads_to_the_next(runs):
    """Each group keeps three that wake for ever; hundreds starve the ranks."""
    left = {name: result['threads'] for name, result in runs[1].items()}
    assert max(left.values()) <= MOST_THREADS, left


def test_a_step_changes_the_weights(runs, tensors):
    """Comparing untouched weights would prove nothing."""
    folder, _ = runs
    before, after = tensors(folder / 'mhc-weights'), tensors(folder / 'mhc-step')
    assert all(not torch.equal(after[key], value) for key, value in before.items())
