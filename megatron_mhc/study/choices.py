"""The values that a study combines: those of its options, else all that make sense."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from megatron_mhc.settings.names import STUDIED_SCHEDULES, V_SCHEDULES
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.names import FULL, PRECISIONS
from megatron_mhc.study.sweep import Sweep

_POWERS = (1, 2, 4, 8, 16, 32, 64)


def sweep_of(options: argparse.Namespace, shape: ModelShape, hardware: Hardware) -> Sweep:
    """The values that the options name, else all that make sense for the model.

    Raises:
        ValueError: a value without effect beside the others.
    """
    schedules = tuple(options.schedule or STUDIED_SCHEDULES)
    if options.vpp and 'interleaved' not in schedules:
        why = 'a V has two chunks a rank' if {*V_SCHEDULES} & {*schedules} else '1f1b has one chunk'
        raise ValueError(
            f'--vpp {options.vpp[0]} has no effect with --schedule {" ".join(schedules)}: {why}; '
            'drop it or add --schedule interleaved'
        )
    for flag, given in (('--schedule', options.schedule), ('--vpp', options.vpp)):
        if given and options.pp and max(options.pp) == 1:
            raise ValueError(
                f'{flag} {given[0]} has no effect with --pp 1: there is no pipeline; '
                'drop it or give --pp 2 or more'
            )
    gpus = _unique(options.gpus or (64,))
    if options.scaling and len(gpus) == 1:
        raise ValueError(
            f'--scaling {options.scaling[0]} has no effect with one number of GPUs; give --gpus '
            f'several, such as {gpus[0]} {2 * gpus[0]}'
        )
    streams, segments = options.num_residual_streams, options.segments
    if shape.value_bytes != 2 and 'fp8' in (options.precision or ()):
        raise ValueError('--precision fp8: the model is fp32; add --bf16 behind --model')
    if not shape.residual.has_streams and (streams or {*(segments or ())} - {FULL, 'none'}):
        flag = '--num-residual-streams' if streams else '--segments'
        kind = shape.residual.residual_type
        raise ValueError(f'{flag} has no effect with --residual-type {kind}; drop one of them')
    rebuilt = [size for size in segments or () if size not in (FULL, 'none')]
    if shape.residual.single_pass and rebuilt:
        raise ValueError(
            f'--segments {rebuilt[0]} cannot be combined with --mhc-single-pass: a segment '
            'rebuilds its reads from the streams alone; use none or full'
        )
    experts = shape.experts.count if shape.experts else 1
    pipeline = [p for p in _POWERS if p <= shape.layers]
    if options.schedule and not options.pp:
        # Without a pipeline there is no schedule.
        pipeline.remove(1)
    return Sweep(
        gpus=gpus,
        tp=_unique(options.tp or [t for t in _POWERS if t <= hardware.gpus_per_node]),
        cp=_unique(options.cp or (1,)),
        pp=_unique(options.pp or pipeline),
        ep=_unique(options.ep or [e for e in range(1, experts + 1) if not experts % e]),
        dp=_unique(options.dp or ()),
        schedule=_unique(schedules),
        vpp=_unique(options.vpp or (2,)),
        micro_batch=_unique(options.micro_batch_size or (1,)),
        streams=_unique(streams or (4,)),
        recompute=_unique(segments or ('none' if shape.residual.single_pass else 'auto',)),
        precision=_unique(options.precision or PRECISIONS[:1]),
    )


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
