"""The model of a study: a recipe, or any that Megatron's flags describe."""

from __future__ import annotations

import argparse
import dataclasses
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from megatron_mhc.inputs.quiet import quiet
from megatron_mhc.recipes.recipe import RECIPES, Flags, parallel_flags, recipe_flags, residual_flags
from megatron_mhc.recipes.script import mock_data
from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.study.names import FULL, STUDIED, only_studied
from megatron_mhc.study.points import Point

# What a study chooses, and what is not there without Transformer Engine.
_CHOSEN = (
    '--tensor-model-parallel-size',
    '--context-parallel-size',
    '--pipeline-model-parallel-size',
    '--expert-model-parallel-size',
    '--expert-tensor-parallel-size',
    '--num-virtual-stages-per-pipeline-rank',
    '--num-layers-per-virtual-pipeline-stage',
    '--pipeline-model-parallel-layout',
    '--pipeline-schedule',
    '--micro-batch-size',
    '--mhc-num-residual-streams',
    '--mhc-recompute-layer-num',
    '--mhc-post-stream',
    '--recompute-granularity',
    '--recompute-method',
    '--recompute-num-layers',
    '--recompute-activations',
    '--recompute-modules',
    '--fp8-format',
    '--fp8-recipe',
)
_ABSENT = ('--moe-grouped-gemm',)
# Of a model for which nobody says.
RESIDUAL = 'mhc'


@dataclass(frozen=True)
class Model:
    """What is studied.

    Args:
        name: for people.
        shape: its sizes.
        batch: sequences of a step.
        flags: of a point, by topic.
        tokens: of the whole training; None where nobody has said.
        line: somebody's own flags, to which the others are added.
        data: the flags that a launch needs beside them.
    """

    name: str
    shape: ModelShape
    batch: int
    flags: Callable[[Point], dict[str, Flags]]
    tokens: float | None = None
    line: tuple[str, ...] = ()
    data: Flags = dataclasses.field(default_factory=dict)


def recipe_model(
    name: str, batch: int | None, residual_type: str, tokens: float | None = None
) -> Model:
    """A recipe.

    Args:
        name: of ``RECIPES``.
        batch: instead of its own, with as many tokens.
        residual_type: of its layers.
        tokens: of the whole training, instead of its own.
    """
    recipe = RECIPES[name]
    total = tokens or recipe.tokens

    def flags(point: Point) -> dict[str, Flags]:
        batch = point.global_batch
        steps = max(2, math.ceil(total / (batch * recipe.sequence)))
        # The shares of the steps stay.
        warmup = max(1, round(recipe.warmup * steps / recipe.steps))
        one = dataclasses.replace(recipe, batch=batch, steps=steps, warmup=warmup)
        return recipe_flags(one, point.layout, point.residual, _one_stream(point)) | _more(point)

    shape, data = recipe.shape(residual_type), mock_data(recipe.vocab)
    return Model(name, shape, batch or recipe.batch, flags, total, data=data)


def own_model(
    line: list[str], batch: int | None, residual_type: str | None, tokens: float | None = None
) -> Model:
    """The model of a Megatron command line; its flags are those to add to that line.

    Args:
        line: the model, ``--vocab-size`` and ``--global-batch-size``.
        batch: instead of the latter.
        residual_type: where the line names none; None for the default.
        tokens: of the whole training.

    Raises:
        ValueError: Megatron does not take the line, or it says what a study chooses.
        RuntimeError: Megatron-Core is absent or out of range.
    """
    from megatron_mhc.bootstrap import prepare
    from megatron_mhc.sizing.shape import shape_from_args

    given = {word.partition('=')[0] for word in line}
    for flag in _CHOSEN:
        if flag in given:
            raise ValueError(f'--model {flag}: that is what a study chooses; drop it')
    if '--hybrid-override-pattern' in given:
        raise ValueError(
            '--model --hybrid-override-pattern: the flags of a layout cut the pattern by its new '
            'name, and Megatron takes one of both; write --hybrid-layer-pattern'
        )
    # Megatron prints its arguments; what is wrong with them it raises.
    with quiet():
        prepare('auto')
        from megatron_mhc.recipes.build import parsed

        try:
            args = parsed([word for word in line if word not in _ABSENT], _Refusing)
            args.padded_vocab_size = _padded(args)
            shape = shape_from_args(args)
        except (ArithmeticError, AssertionError, NotImplementedError, TypeError) as error:
            # Some of its assertions have no words; their line says what they demand.
            why = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            raise ValueError(f'--model: Megatron does not take these flags: {why}') from error
    # Megatron would make one up.
    if batch is None and '--global-batch-size' not in given:
        raise ValueError('--model: no batch; add --global-batch-size')
    batch = batch or args.global_batch_size
    named = '--residual-type' in given
    if not named:
        residual = ResidualConfig(residual_type or RESIDUAL)
        shape = dataclasses.replace(shape, residual=residual)
    kind = shape.residual.residual_type
    if kind not in STUDIED:
        raise ValueError(f'--model --residual-type {kind}: {only_studied(kind)}')
    if named and residual_type not in (None, kind):
        raise ValueError(
            f'--residual-type {residual_type} beside --model --residual-type {kind}: a study is of '
            'one model; drop one of them'
        )

    def flags(point: Point) -> dict[str, Flags]:
        sizes: Flags = {
            'micro-batch-size': point.layout.micro_batch,
            'global-batch-size': point.global_batch,
        }
        return {
            'RESIDUAL_ARGS': residual_flags(point.residual),
            'TRAINING_ARGS': sizes,
            'PARALLEL_ARGS': parallel_flags(shape, point.layout, _one_stream(point)),
        } | _more(point)

    return Model('own model', shape, batch, flags, tokens, tuple(line))


def _one_stream(point: Point) -> bool:
    """Whether F_post,res has no stream of its own; full recomputation refuses it."""
    return point.one_queue or point.recompute == FULL


def _more(point: Point) -> dict[str, Flags]:
    """Flags of precision and full recomputation, where there are any."""
    found: dict[str, Flags] = {}
    if point.precision == 'fp8':
        # Delayed scaling, the default, does not run under a V schedule.
        found['PRECISION_ARGS'] = {'fp8-format': 'hybrid', 'fp8-recipe': 'tensorwise'}
    if point.recompute == FULL:
        found['RECOMPUTE_ARGS'] = {
            'recompute-granularity': 'full',
            'recompute-method': 'uniform',
            'recompute-num-layers': 1,
        }
    return found


def _padded(args: argparse.Namespace) -> int:
    """The vocabulary as Megatron pads it on one tensor-parallel rank."""
    if args.vocab_size is None:
        raise ValueError('--model: no vocabulary; add --vocab-size')
    multiple = args.make_vocab_size_divisible_by
    return -(-args.vocab_size // multiple) * multiple


class _Refusing(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f'--model: {message}')
