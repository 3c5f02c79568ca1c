"""What ``megatron-mhc convert --to hybrid`` and ``--to gpt`` say."""

from __future__ import annotations

import argparse
import pathlib
import shlex
from typing import Any

from megatron_mhc.convert.choices import FLAGS
from megatron_mhc.convert.conversion import Progress
from megatron_mhc.convert.model_class import MovedRun, move
from megatron_mhc.convert.pattern import FLAG, STAGE
from megatron_mhc.convert.told import Told
from megatron_mhc.inputs.table import table


def answer(options: argparse.Namespace, given: dict[str, Any], progress: Progress) -> Told:
    """Move the run; ``given`` are options of new streams, which it does not get.

    Raises:
        ValueError: there are some; or as ``move``.
    """
    flags = [FLAGS[name] for name in given] + ['--from'] * (options.origin != 'auto')
    flags += ['--mhc-numerics'] * (options.mhc_numerics is not None)
    if flags:
        raise ValueError(
            f'{flags[0]}: --to {options.to} keeps the residual connections as they are; drop the '
            'flag, or convert twice'
        )
    report = move(
        options.source,
        options.destination,
        options.to,
        step=options.step,
        optimizer=not options.no_optim,
        dry_run=options.dry_run,
        verify=options.verify,
        overwrite=options.overwrite,
        unchecked=options.unchecked,
        progress=progress,
    )
    load = how_to_go_on(report, options.destination)
    told = plain(report) | {'load': None if options.dry_run else load}
    return Told(told, lambda: tell(report), load)


def plain(report: MovedRun) -> dict[str, Any]:
    """As plain values."""
    return {
        'to': report.target,
        'hybrid_layer_pattern': report.pattern,
        'iteration': report.iteration,
        'weights': report.weights,
        'optimizer_states': report.states,
        'bytes': report.nbytes,
        'names': [list(pair) for pair in report.names],
        'verified': report.verified or None,
    }


def tell(report: MovedRun) -> None:
    print(f'-> {report.target}: {FLAG} {shlex.quote(report.pattern)}')
    for line in table([('from', 'to'), *report.names]):
        print(f'  {line}')
    when = 'a release' if report.iteration is None else f'iteration {report.iteration}'
    print(
        f'  {report.weights} weights and {report.states} optimizer states, every bit as it was; '
        f'{report.nbytes:,} bytes in all; {when}'
    )
    if report.verified:
        print('verified: all {compared} logits are equal'.format(**report.verified))


def how_to_go_on(report: MovedRun, destination: pathlib.Path) -> str:
    """The flags of the run that goes on."""
    flags = ['--load', shlex.quote(str(destination)), '--use-checkpoint-args']
    if not report.states and report.iteration is not None:
        flags.append('--no-load-optim')
    model = 'HybridModel' if report.target == 'hybrid' else 'GPTModel'
    said = f'train on with {" ".join(flags)}, from a script that builds a {model}'
    if report.target == 'hybrid' and STAGE in report.pattern:
        said += f'; on other pipeline stages give {FLAG} too, which ends them with {STAGE!r}'
    return said
