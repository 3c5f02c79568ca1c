"""Every recipe on every layout is a command line that Megatron and we accept."""

from __future__ import annotations

import argparse

import pytest

from megatron_mhc.recipe import LAYOUTS, RECIPES, recipe_flags, words

CASES = [(name, layout) for name in RECIPES for layout in LAYOUTS[name]]
# What Megatron refuses at this point only because Transformer Engine is not here.
LOCAL = ['--transformer-impl', 'local', '--no-gradient-accumulation-fusion']


@pytest.fixture(scope='module')
def parser(megatron):
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import ALL_PATCHES, RESIDUAL_PATCHES

    engine.apply((ARGUMENTS_PATCH,))
    yield
    engine.revert(tuple(patch for patch in ALL_PATCHES if patch not in RESIDUAL_PATCHES))


@pytest.mark.parametrize('residual_type', ['standard', 'hc', 'mhc'])
@pytest.mark.parametrize(('name', 'layout'), CASES)
def test_flags_are_accepted(parser, name, layout, residual_type, monkeypatch):
    from megatron.training import arguments

    recipe, layout = RECIPES[name], LAYOUTS[name][layout]
    topics = recipe_flags(recipe, layout, residual_type)
    flags = [word for topic in topics.values() for line in words(topic) for word in line]
    monkeypatch.setenv('WORLD_SIZE', str(layout.gpus))
    known = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = known.parse_args([*flags, *LOCAL, '--mock-data'])
    args.rank, args.world_size = 0, layout.gpus
    args = arguments.validate_args(args)
    assert args.data_parallel_size == layout.dp and args.residual_type == residual_type
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    assert microbatches == layout.microbatches(recipe.batch)
