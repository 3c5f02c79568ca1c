"""What ``megatron-mhc study`` answers: a study as its options ask for it, as text or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.values import flag_of
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.settings.names import PIPELINE_SCHEDULES, V_SCHEDULES
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.study.calibrate import as_text, calibration
from megatron_mhc.study.hardware import Hardware, hardware_of
from megatron_mhc.study.kernels import BytesModel, Measured
from megatron_mhc.study.model import own_model, recipe_model
from megatron_mhc.study.output import (
    CONNECTIONS,
    connections,
    flags_text,
    make_folder,
    points_table,
    queues,
    refusals,
    verdict,
    write,
)
from megatron_mhc.study.points import Study, best_of, pareto, run_study
from megatron_mhc.study.sweep import Sweep

PROGRAM = 'megatron-mhc study'
_STUDY_ONLY = (
    *('output', 'set', 'kernel_times', 'gpus', 'tp', 'pp', 'vpp', 'ep', 'dp', 'schedule'),
    *('micro_batch_size', 'num_residual_streams', 'recompute', 'global_batch_size'),
)
_POWERS = (1, 2, 4, 8, 16, 32, 64)


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
        print(json.dumps([row._asdict() | {'error': row.error} for row in rows], indent=1))
    else:
        print(as_text(rows))
    return 0


def _study(options: argparse.Namespace) -> int:
    if (options.name is None) == (options.model is None):
        raise ValueError(
            f'RECIPE or --model, one of both: name one of {", ".join(RECIPES)}, or give flags'
        )
    hardware = hardware_of(options.hardware, options.set)
    kernels: BytesModel | Measured = BytesModel(hardware)
    if options.kernel_times is not None:
        if hardware.post_overlap:
            raise ValueError('--kernel-times: set post_overlap=0; times are measured as they are')
        kernels = Measured(options.kernel_times, hardware)
    if options.output is not None:
        make_folder(options.output)
    given = options.global_batch_size, options.residual_type
    model = recipe_model(options.name, *given) if options.name else own_model(options.model, *given)
    sweep = sweep_of(options, model.shape, hardware)
    study = run_study(model.shape, model.batch, sweep, hardware, kernels, _progress)
    best = {n: best_of(points) for n, points in study.streams.items()}
    flags = {
        n: flags_text(model.flags(one.layout, one.residual, one.one_queue))
        for n, one in best.items()
        if one is not None
    }
    title = f'{model.name}, batch {model.batch}, {hardware.name}, kernels: {kernels.source}'
    if options.output is not None:
        write(options.output, study, hardware, title, flags)
    if options.json:
        print(json.dumps(_plain(study, hardware, flags)))
    else:
        _print(study, hardware, flags, title, options.top)
    return int(None in best.values())


def sweep_of(options: argparse.Namespace, shape: ModelShape, hardware: Hardware) -> Sweep:
    """The values that the options name, else all that make sense for the model.

    Raises:
        ValueError: a value without effect beside the others.
    """
    schedules = tuple(options.schedule or PIPELINE_SCHEDULES)
    if options.vpp and 'interleaved' not in schedules:
        why = 'a V has two chunks a rank' if {*V_SCHEDULES} & {*schedules} else '1f1b has one chunk'
        raise ValueError(
            f'--vpp {options.vpp[0]} has no effect with --schedule {" ".join(schedules)}: {why}; '
            'drop it or add --schedule interleaved'
        )
    if options.schedule and options.pp and max(options.pp) == 1:
        raise ValueError(
            f'--schedule {schedules[0]} has no effect with --pp 1: there is no pipeline; '
            'drop it or give --pp 2 or more'
        )
    streams, segments = options.num_residual_streams, options.recompute
    if not shape.residual.has_streams and (streams or segments):
        flag = '--num-residual-streams' if streams else '--recompute'
        kind = shape.residual.residual_type
        raise ValueError(f'{flag} has no effect with --residual-type {kind}; drop one of them')
    gpus = options.gpus or (64,)
    experts = shape.experts.count if shape.experts else 1
    pipeline = [p for p in _POWERS if p <= shape.layers]
    if options.schedule and not options.pp:
        # Without a pipeline there is no schedule.
        pipeline.remove(1)
    return Sweep(
        gpus=_unique(gpus),
        tp=_unique(options.tp or [t for t in _POWERS if t <= hardware.gpus_per_node]),
        pp=_unique(options.pp or pipeline),
        ep=_unique(options.ep or [e for e in range(1, experts + 1) if not experts % e]),
        dp=_unique(options.dp or ()),
        schedule=_unique(schedules),
        vpp=_unique(options.vpp or (2,)),
        micro_batch=_unique(options.micro_batch_size or (1,)),
        streams=_unique(streams or (4,)),
        recompute=_unique(segments or ('auto',)),
    )


def _plain(study: Study, hardware: Hardware, flags: dict[int, str]) -> dict[str, Any]:
    fronts = {n: pareto(points) for n, points in study.streams.items()}
    return {
        'hardware': dataclasses.asdict(hardware),
        'points': [point.as_dict() for point in study.points],
        'pareto': [point.as_dict() for front in fronts.values() for point in front],
        'refused': [
            {'reason': reason.words, 'remedy': reason.remedy, 'layouts': count}
            for reason, count in study.refused.items()
        ],
        'best': [
            front[0].as_dict()
            | {'flags': flags[n], 'environment': {CONNECTIONS: connections(front[0])}}
            for n, front in fronts.items()
            if front
        ],
    }


def _print(study: Study, hardware: Hardware, flags: dict[int, str], title: str, top: int) -> None:
    print(f'{title}\n{len(study.points)} layouts, {sum(p.fits for p in study.points)} fit')
    if study.refused:
        print(refusals(study))
    for n, points in study.streams.items():
        front = pareto(points)
        print(f'\n{n} stream{"s" * (n > 1)}')
        if front:
            shown = f'{min(top, len(front))} of {len(front)}'
            print(f'no other is better in step, memory and GPUs at once ({shown}):')
            print(points_table(front[:top]))
        print(verdict(points, hardware))
        best = best_of(points)
        if best is not None and n in flags:
            print('    ' + flags[n])
            print(queues(best, hardware))


def _progress(total: int) -> Callable[[int], object]:
    """A bar on a terminal, or nothing."""
    if not sys.stderr.isatty():
        return bool
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return bool
    return tqdm(total=total, unit='case', desc='study', leave=False).update


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
