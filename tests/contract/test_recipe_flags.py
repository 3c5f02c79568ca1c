"""Recipes and what a study prints are command lines that Megatron and we accept."""

from __future__ import annotations

import argparse
import dataclasses
import random
import shlex

import pytest

from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES, recipe_flags, words
from megatron_mhc.recipes.script import flags_text
from megatron_mhc.settings.names import STUDIED_SCHEDULES
from megatron_mhc.study.estimate import run_study
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.model import own_model, recipe_model
from megatron_mhc.study.presets import PRESETS
from megatron_mhc.study.sweep import Sweep

CASES = [(name, layout) for name in RECIPES for layout in LAYOUTS[name]]
# What Megatron refuses at this point only because Transformer Engine is not here.
LOCAL = ['--transformer-impl', 'local', '--no-gradient-accumulation-fusion']


@pytest.fixture(scope='module')
def parser(megatron):
    from megatron.training import arguments

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import ALL_PATCHES, RESIDUAL_PATCHES

    engine.apply((ARGUMENTS_PATCH,))
    yield arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    engine.revert(tuple(patch for patch in ALL_PATCHES if patch not in RESIDUAL_PATCHES))


@pytest.mark.parametrize('residual_type', ['standard', 'hc', 'mhc'])
@pytest.mark.parametrize(('name', 'layout'), CASES)
def test_flags_are_accepted(parser, name, layout, residual_type, monkeypatch):
    recipe, layout = RECIPES[name], LAYOUTS[name][layout]
    topics = recipe_flags(recipe, layout, residual_type)
    flags = [word for topic in topics.values() for line in words(topic) for word in line]
    args = validated(parser, flags, layout.gpus, monkeypatch)
    assert args.data_parallel_size == layout.dp and args.residual_type == residual_type
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    assert microbatches == layout.microbatches(recipe.batch)


def validated(parser, flags, gpus, monkeypatch):
    """The arguments of a process that has parsed no others."""
    from megatron.training import arguments

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import ALL_PATCHES, RESIDUAL_PATCHES

    kept = (*RESIDUAL_PATCHES, ARGUMENTS_PATCH)
    engine.revert(tuple(patch for patch in ALL_PATCHES if patch not in kept))

    monkeypatch.setenv('WORLD_SIZE', str(gpus))
    args = parser.parse_args([*flags, *LOCAL, '--mock-data'])
    args.rank, args.world_size = 0, gpus
    args = arguments.validate_args(args)
    # The model's own checks: of the layout, of the pipeline's messages.
    arguments.core_transformer_config_from_args(args)
    return args


def studied():
    """Layouts of each schedule and number of pipeline ranks, with several blocks."""
    hardware, shape = PRESETS['h200'], RECIPES['27b'].shape()
    sweep = Sweep(
        gpus=(64,),
        tp=(1, 2, 4),
        pp=(1, 2, 3, 4, 5),
        ep=(1, 4, 8),
        vpp=(2, 3),
        micro_batch=(1, 2),
        streams=(2, 4),
        recompute=('none', 'auto', 5),
    )
    # Divides by 3 and 5 too, with 60 and 64 ranks.
    points = []
    for gpus in (60, 64):
        some = dataclasses.replace(sweep, gpus=(gpus,))
        points += run_study(shape, 1920, some, hardware, BytesModel(hardware)).points
    random.Random(0).shuffle(points)
    # Every value of these beside every schedule.
    found, seen = [], set()
    for point in points:
        layout, blocks = point.layout, point.residual.recompute_layer_num
        pairs = {
            (layout.schedule, name, value)
            for name, value in {'pp': layout.pp, 'vpp': layout.vpp, 'blocks': blocks}.items()
        }
        if pairs - seen:
            found.append(point)
            seen |= pairs
    return found


def test_what_a_study_prints_is_accepted(parser, monkeypatch):
    found = studied()
    assert {point.layout.schedule for point in found} == set(STUDIED_SCHEDULES)
    assert len(found) > 20
    for point in found:
        layout, model = point.layout, recipe_model('27b', 1920, 'mhc')
        flags = shlex.split(flags_text(model.flags(point)).replace('\\\n', ' '))
        args = validated(parser, flags, layout.gpus, monkeypatch)
        assert args.data_parallel_size == layout.dp
        assert args.mhc_num_residual_streams == point.residual.num_residual_streams
        blocks = args.mhc_recompute_layer_num
        assert str(blocks or 'none') == str(point.residual.recompute_layer_num)
        chunks = args.virtual_pipeline_model_parallel_size or 1
        assert chunks == layout.chunks
        microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        assert microbatches == point.microbatches


def test_full_recomputation_is_accepted(parser, monkeypatch):
    hardware, model = PRESETS['h200'], recipe_model('27b', 1280, 'mhc')
    sweep = Sweep((64,), (1,), (4,), (8,), schedule=('1f1b',), recompute=('full',))
    (point,) = run_study(model.shape, 1280, sweep, hardware, BytesModel(hardware)).points
    flags = shlex.split(flags_text(model.flags(point)).replace('\\\n', ' '))
    args = validated(parser, flags, 64, monkeypatch)
    found = args.recompute_granularity, args.recompute_method, args.recompute_num_layers
    assert found == ('full', 'uniform', 1) and args.residual_type == 'mhc'


OWN = (
    '--num-layers 8 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 8 '
    '--group-query-attention --num-query-groups 4 --seq-length 128 --max-position-embeddings 128 '
    '--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm '
    '--vocab-size 1000 --global-batch-size 64 --bf16'
).split()


def test_a_model_of_ones_own(parser, monkeypatch, capfd):
    model = own_model(OWN, None, 'mhc')
    # Megatron prints a hundred lines of arguments on the way.
    assert capfd.readouterr() == ('', '')
    assert (model.shape.hidden, model.shape.vocab, model.batch) == (256, 1024, 64)
    assert model.shape.tied and model.shape.residual.enabled and model.shape.value_bytes == 2
    assert own_model(OWN[:-1], None, 'mhc').shape.value_bytes == 4
    assert own_model([*OWN[:-1], '--fp16'], None, 'mhc').shape.value_bytes == 2
    hardware = PRESETS['h100']
    sweep = Sweep((8,), (1, 2), (1, 2, 4), (1,))
    points = run_study(model.shape, model.batch, sweep, hardware, BytesModel(hardware)).points
    assert {point.layout.schedule for point in points} == set(STUDIED_SCHEDULES)
    for point in points:
        topics = model.flags(point)
        added = [word for topic in topics.values() for line in words(topic) for word in line]
        args = validated(parser, [*OWN, *added], 8, monkeypatch)
        assert args.data_parallel_size == point.layout.dp


HYBRID = [
    *OWN[2:],
    *'--mamba-num-heads 8 --mamba-head-dim 64 --mamba-num-groups 4 --mamba-state-dim 16'.split(),
]


@pytest.mark.parametrize('pattern', ['M-M*-GM-', 'M-|M-|*-|M-'])
def test_a_hybrid_model_of_ones_own(parser, monkeypatch, pattern):
    """Whatever runs on this machine; the layers with CUDA kernels are not asked for here."""
    model = own_model([*HYBRID, '--hybrid-layer-pattern', pattern], None, None)
    assert model.shape.pattern == pattern and model.shape.layers == 8
    assert (model.shape.mamba.heads, model.shape.mamba.state) == (8, 16)
    assert (model.shape.delta_net is not None) == ('G' in pattern)
    hardware = PRESETS['h100']
    sweep = Sweep((8,), (1, 2), (1, 2, 4, 8), (1,))
    study = run_study(model.shape, model.batch, sweep, hardware, BytesModel(hardware))
    assert ('fewer parts than stages' in {one.words for one in study.refused}) == ('|' in pattern)
    for point in study.points:
        layout, topics = point.layout, model.flags(point)
        added = [word for topic in topics.values() for line in words(topic) for word in line]
        # Megatron's and our checks.
        cut = added.index('--hybrid-layer-pattern') + 1
        assert added[cut].count('|') == (layout.stages - 1 if layout.pp > 1 else 0)
        args = validated(parser, [*HYBRID, *added], 8, monkeypatch)
        assert (args.virtual_pipeline_model_parallel_size or 1) == layout.chunks
        assert (args.num_layers, args.data_parallel_size) == (8, layout.dp)


def test_who_says_the_residual_type(parser):
    hc = ['--residual-type', 'hc']
    for line, asked, found in (
        (OWN, None, 'mhc'),
        (OWN, 'hc', 'hc'),
        ([*OWN, *hc], None, 'hc'),
        ([*OWN, *hc], 'hc', 'hc'),
        ([*OWN, '--residual-type=standard'], None, 'standard'),
    ):
        assert own_model(line, None, asked).shape.residual.residual_type == found
    message = '--residual-type mhc beside --model --residual-type hc: .*; drop one of them'
    with pytest.raises(ValueError, match=message):
        own_model([*OWN, *hc], None, 'mhc')


@pytest.mark.parametrize(
    'line, message',
    [
        ([*OWN, '--recompute-activations'], '--recompute-activations: that is what a study'),
        ([*OWN, '--recompute-modules', 'core_attn'], '--recompute-modules: that is what a study'),
        ([*HYBRID, '--hybrid-override-pattern', '*-'], 'write --hybrid-layer-pattern'),
        ([*HYBRID, '--hybrid-layer-pattern', '*-/*-'], 'prediction layers .* are not sized up'),
        ([*OWN, '--pipeline-model-parallel-size', '2'], 'that is what a study chooses; drop it'),
        ([*OWN, '--bogus'], 'unrecognized arguments: --bogus'),
        ([*OWN, '--hidden-size', '250'], 'these flags: assert args.hidden_size % args.num_att'),
        ([*OWN, '--residual-type', 'mudd'], '--residual-type mudd: a study does not know'),
        ([*OWN, '--context-parallel-size', '2'], 'that is what a study chooses; drop it'),
        ([*OWN, '--mtp-num-layers', '1'], '--mtp-num-layers'),
        (OWN[: OWN.index('--global-batch-size')], 'no batch; add --global-batch-size'),
        ([word for word in OWN if word not in ('--vocab-size', '1000')], 'add --vocab-size'),
    ],
)
def test_what_is_no_model_is_refused(parser, line, message):
    with pytest.raises(ValueError, match=message):
        own_model(line, None, 'mhc')
