"""Hybrid models on paper: parameters against what Megatron builds, FLOPs against its own count."""

from __future__ import annotations

import dataclasses
import importlib
import types

import pytest
import torch
from test_model_size import LATENT, MOE, PLAIN, RESIDUALS, SIZES, counting
from torch import nn

from megatron_mhc.recipes.build import build, counted, model_arguments, recipe_arguments
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.sizing.flops import STEP, residual_flops, step_flops, token_flops
from megatron_mhc.sizing.shape import shape_from_args
from megatron_mhc.sizing.size import summary

WIDTHS = {name: value for name, value in SIZES.items() if name != 'num-layers'}
MAMBA = {
    'mamba-num-heads': 8,
    'mamba-head-dim': 8,
    'mamba-num-groups': 2,
    'mamba-state-dim': 6,
}
DELTA = {
    'linear-num-key-heads': 2,
    'linear-key-head-dim': 6,
    'linear-num-value-heads': 4,
    'linear-value-head-dim': 8,
    'linear-conv-kernel-dim': 3,
}
EXPERTS = {**MOE, 'moe-shared-expert-intermediate-size': 28}
MODELS = {
    '*-': {},
    'M-M*-': {**MAMBA, **PLAIN},
    'MM*-M': {**PLAIN, 'mamba-head-dim': 16, 'mamba-num-groups': 1},
    'MG*-': {**MAMBA, **DELTA, 'untie-embeddings-and-output-weights': True},
    'GEM*E': {**MAMBA, **DELTA, **PLAIN, **EXPERTS},
    'M+E-': {**LATENT, **MAMBA, **MOE},
}
PUBLISHED = {'nemotron-h-8b': 8_100_852_736, 'nemotron-nano-9b': 8_888_227_328}


class GatedNorm(nn.Module):
    """One vector: Megatron's class is made of one of the package that its kernels come from."""

    def __init__(self, width: int, **options: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


@pytest.fixture(scope='module')
def parser(megatron):
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import TRAINING_PATCHES

    engine.apply((ARGUMENTS_PATCH,))
    yield
    engine.revert((ARGUMENTS_PATCH, *TRAINING_PATCHES))


@pytest.fixture
def built(parser, monkeypatch):
    """``built(args)`` -> the model, of Megatron's own layers and the constructors of its mixers."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.ssm import mamba_mixer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_mhc.patches.cpu_hybrid import local_submodules

    monkeypatch.setattr(mamba_mixer, 'ExtendedRMSNorm', GatedNorm)
    mixers = ('mamba_mixer', 'mamba_context_parallel')
    for name in (*mixers, 'gated_delta_net', 'gated_delta_net.common', 'gated_delta_net.gdn'):
        try:
            module = importlib.import_module(f'megatron.core.ssm.{name}')
        except ImportError:  # not in this release
            continue
        # Nothing runs.
        for needed in ('HAVE_MAMBA_SSM', 'HAVE_EINOPS', 'HAVE_FLA', 'chunk_gated_delta_rule'):
            if hasattr(module, needed):
                monkeypatch.setattr(module, needed, True)

    def local(layer, norm, **parts):
        """A layer with the norm before it that Transformer Engine has in its projection."""
        mixer = 'mixer' if hasattr(layer.submodules, 'mixer') else 'self_attention'
        inner = getattr(layer.submodules, mixer)
        linear = {'in_proj': ColumnParallelLinear, 'out_proj': RowParallelLinear}
        inner = dataclasses.replace(
            inner, submodules=dataclasses.replace(inner.submodules, **linear, **parts)
        )
        before = 'norm' if mixer == 'mixer' else 'input_layernorm'
        submodules = dataclasses.replace(layer.submodules, **{mixer: inner, before: norm})
        return dataclasses.replace(layer, submodules=submodules)

    def make(args):
        plain = types.SimpleNamespace(normalization=args.normalization)
        stock = mamba_stack_spec.submodules
        norm = LocalSpecProvider().layer_norm(rms_norm=args.normalization == 'RMSNorm')
        layers = {'mamba_layer': local(stock.mamba_layer, norm)}
        if hasattr(stock, 'gdn_layer'):
            layers['gdn_layer'] = local(stock.gdn_layer, norm, out_norm=norm)
        submodules = dataclasses.replace(local_submodules(stock, plain), **layers)
        return build(args, dataclasses.replace(mamba_stack_spec, submodules=submodules))

    return make


def arguments(pattern: str, **more: object):
    from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols

    if set(pattern) - set(Symbols.VALID_LAYERS):
        pytest.skip('a layer that this release does not have')
    flags = WIDTHS | MODELS[pattern] | {'hybrid-layer-pattern': pattern} | more
    return model_arguments(flags, 64)


@pytest.mark.parametrize(
    ('pattern', 'residual'),
    [*((one, 'mhc') for one in MODELS), *(('M-M*-', one) for one in ('', 'mhc learned', 'hc'))],
)
def test_every_kind_of_layer_is_counted_exactly(built, pattern, residual):
    args = arguments(pattern, **RESIDUALS.get(residual, {}))
    assert summary(shape_from_args(args)) == counted(built(args), args)


@pytest.mark.parametrize('residual', ['standard', 'mhc'])
@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_model_has_the_parameters_of_its_weights(built, name, residual):
    """To the last one: on paper, as Megatron builds it, and in the files on Hugging Face."""
    recipe = RECIPES[name]
    args = recipe_arguments(recipe, residual)
    args.bf16 = True
    shape = shape_from_args(args)
    assert shape == recipe.shape(residual)
    found = counted(built(args), args)
    assert found == summary(shape)
    assert found['total'] - found['mhc'] == PUBLISHED[name]
    assert (found['mhc'] > 0) == (residual == 'mhc')


@pytest.mark.parametrize('pattern', MODELS)
def test_flops_are_megatrons_own(parser, pattern):
    """It leaves out the router and latent attention, and takes Mamba's inner width to be 2 C."""
    args = arguments(pattern)
    shape, sequences = shape_from_args(args), 5
    flops = token_flops(shape)
    difference = -flops['router']
    if '+' in pattern:
        difference -= flops['attention_projections'] + flops['attention_core']
    stock = counting()[1](args, sequences)
    assert stock == step_flops(shape, sequences) + STEP * sequences * args.seq_length * difference


@pytest.mark.parametrize('name', PUBLISHED)
def test_flops_of_published_models(parser, name):
    """Of the one whose inner width is not 2 C = 8960, but 10240, ours are more."""
    recipe = RECIPES[name]
    args, shape = recipe_arguments(recipe), recipe.shape()
    layers, hidden, mamba = recipe.pattern.count('M'), recipe.hidden, recipe.mamba
    wider = mamba.inner - 2 * hidden
    assert wider == {'nemotron-h-8b': 0, 'nemotron-nano-9b': 1280}[name]
    more = layers * wider * (2 * hidden * 3 + 7 * mamba.state)
    own = residual_flops(shape.residual, hidden, len(recipe.pattern))
    step = STEP * 7 * recipe.sequence
    ours, stock = counting()
    assert stock(args, 7) + step * (more + own) == step_flops(shape, 7)
    assert ours(args, 7) + step * more == step_flops(shape, 7)


@pytest.mark.parametrize(
    ('pattern', 'said'),
    [('*-/*-', "prediction layers \\(behind '/'\\) are not sized up"), ('D-', 'sparse attention')],
)
def test_layers_that_are_not_described_are_refused(pattern, said):
    with pytest.raises(NotImplementedError, match=f'{said}.*; leave them out'):
        shape_from_args(types.SimpleNamespace(hybrid_layer_pattern=pattern))


def test_experts_of_a_pattern_need_a_number(parser):
    args = model_arguments(WIDTHS | {'hybrid-layer-pattern': '*E', 'num-experts': 4}, 64)
    args.num_experts = None
    with pytest.raises(ValueError, match="pattern \\*E: 'E' needs --num-experts; give it"):
        shape_from_args(args)
