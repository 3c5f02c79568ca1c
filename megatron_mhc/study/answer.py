"""What ``megatron-mhc study`` answers: a study as its options ask for it, as text or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import functools

from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.values import flag_of
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.recipes.script import flags_text
from megatron_mhc.study.budget import Budget
from megatron_mhc.study.calibrate import as_text, calibration
from megatron_mhc.study.choices import sweep_of
from megatron_mhc.study.estimate import run_study
from megatron_mhc.study.files import make_folder, require_matplotlib, write, write_study
from megatron_mhc.study.kernels import BytesModel, Measured
from megatron_mhc.study.launch import launch_scripts
from megatron_mhc.study.model import RESIDUAL, Model, own_model, recipe_model
from megatron_mhc.study.names import SCALING
from megatron_mhc.study.points import best_of
from megatron_mhc.study.presets import hardware_of
from megatron_mhc.study.report import Answer, as_words, plain
from megatron_mhc.study.scaling import curves

PROGRAM = 'megatron-mhc study'
_PROGRESS = functools.partial(progress, doing='study', unit='case')
_STUDY_ONLY = (
    *('output', 'set', 'kernel_times', 'gpus', 'tp', 'cp', 'pp', 'vpp', 'ep', 'dp', 'schedule'),
    *('micro_batch_size', 'num_residual_streams', 'segments', 'precision', 'global_batch_size'),
    *('scaling', 'train_tokens', 'gpu_hour_price', 'launch_scripts'),
    *('hardware', 'top', 'residual_type'),
)


def main(options: argparse.Namespace) -> int:
    """Run a study; 0, 1 where no layout fits, or a refusal with status 2."""
    try:
        return _calibrate(options) if options.calibrate else _study(options)
    except (ValueError, RuntimeError) as error:
        refuse(PROGRAM, ' '.join(str(error).split()))


def _calibrate(options: argparse.Namespace) -> int:
    if options.name or options.model:
        raise ValueError('--calibrate has models of its own; drop the recipe, or --calibrate')
    for name in _STUDY_ONLY:
        if getattr(options, name):
            flag = flag_of(name)
            raise ValueError(f'{flag} has no effect with --calibrate; drop one of them')
    rows = calibration()
    if options.json:
        print(as_json([row._asdict() | {'error': row.error} for row in rows]))
    else:
        print(as_text(rows))
    return 0


def _study(options: argparse.Namespace) -> int:
    if (options.name is None) == (options.model is None):
        raise ValueError(
            f'RECIPE or --model, one of both: name one of {", ".join(RECIPES)}, or give flags'
        )
    hardware = hardware_of(options.hardware or 'h100', options.set)
    kernels: BytesModel | Measured = BytesModel(hardware)
    if options.kernel_times is not None:
        if hardware.post_overlap:
            raise ValueError('--kernel-times: set post_overlap=0; times are measured as they are')
        kernels = Measured(options.kernel_times, hardware)
    _make_folders(options)
    batch, kind, tokens = options.global_batch_size, options.residual_type, options.train_tokens
    if options.name:
        model = recipe_model(options.name, batch, kind or RESIDUAL, tokens)
    else:
        model = own_model(options.model, batch, kind, tokens)
    budget = _budget(options, model)
    sweep = sweep_of(options, model.shape, hardware)
    study = run_study(model.shape, model.batch, sweep, hardware, kernels, _PROGRESS)
    found = []
    modes = options.scaling or (SCALING if len(sweep.gpus) > 1 else SCALING[:1])
    for mode in dict.fromkeys(modes):
        points = study.points
        if mode == 'weak':
            weak = dataclasses.replace(sweep, grows=True)
            points = run_study(model.shape, model.batch, weak, hardware, kernels, _PROGRESS).points
        found.append(curves(points, mode))
    best = {n: best_of(points) for n, points in study.streams.items()}
    flags = {n: flags_text(model.flags(one)) for n, one in best.items() if one is not None}
    title = f'{model.name}, batch {model.batch}, {hardware.name}, kernels: {kernels.source}'
    answer = Answer(title, hardware, study, sweep.gpus, found, flags, budget)
    if options.output is not None:
        write_study(options.output, answer)
    if options.launch_scripts is not None:
        scripts = launch_scripts(model, found[0], hardware)
        write('--launch-scripts', options.launch_scripts, scripts)
    print(as_json(plain(answer)) if options.json else as_words(answer, options.top or 12))
    return int(None in best.values())


def _make_folders(options: argparse.Namespace) -> None:
    """Before anything is computed."""
    if options.output is not None:
        require_matplotlib()
        make_folder('--output', options.output)
    if options.launch_scripts is not None:
        make_folder('--launch-scripts', options.launch_scripts)


def _budget(options: argparse.Namespace, model: Model) -> Budget | None:
    if model.tokens is not None:
        return Budget(model.tokens, options.gpu_hour_price)
    if options.gpu_hour_price is not None:
        raise ValueError(
            f'--gpu-hour-price {options.gpu_hour_price:g} has no effect without a number of '
            'tokens; add --train-tokens, such as 1T'
        )
    return None
