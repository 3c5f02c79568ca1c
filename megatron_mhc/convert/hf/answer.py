"""What ``megatron-mhc convert`` says of models for transformers."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron_mhc.convert.choices import FLAGS, HF
from megatron_mhc.convert.conversion import Progress
from megatron_mhc.convert.hf.export import Exported, export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.convert.told import Told, tell_verified
from megatron_mhc.settings.names import STREAM_TYPES


def answer(options: argparse.Namespace, given: dict[str, Any], progress: Progress) -> Told:
    """Export, or bring back.

    Args:
        given: options of new streams, which an export does not make.
    """
    _refuse_in_vain(options, given)
    places = options.source, options.destination
    common = {
        'dry_run': options.dry_run,
        'verify': options.verify,
        'overwrite': options.overwrite,
        'progress': progress,
    }
    if options.to == HF:
        report = export(*places, step=options.step, **common)
        trusted = ', trust_remote_code=True' if 'auto_map' in report.config else ''
        then = f"AutoModelForCausalLM.from_pretrained('{options.destination}'{trusted})"
    else:
        report = restore(*places, **common)
        then = f'train on with --load {options.destination}, a release'
    return Told(dataclasses.asdict(report), lambda: _print(report), then)


def _refuse_in_vain(options: argparse.Namespace, given: dict[str, Any]) -> None:
    flags = [FLAGS[name] for name in given]
    origins = ('auto',) if options.to == HF else ('auto', HF)
    flags += ['--from'] if options.origin not in origins else []
    flags += ['--step'] if options.step is not None and options.to != HF else []
    flags += ['--unchecked'] if options.unchecked else []
    flags += ['--mhc-numerics'] if options.mhc_numerics is not None else []
    if flags:
        raise ValueError(f'{", ".join(flags)}: no effect with --to {options.to}; leave it out')


def _print(report: Exported) -> None:
    config = report.config
    residual = config.get('residual_type', 'standard')
    streams = f', n = {config["num_residual_streams"]}' if residual in STREAM_TYPES else ''
    print(
        f'{residual}: {config["num_hidden_layers"]} layers{streams}, C = {config["hidden_size"]}, '
        f'{report.tensors} tensors, {report.nbytes:,} bytes, {config["dtype"]}'
    )
    if report.dropped:
        print(f'{report.dropped} entries of multi-token prediction left out')
    if report.tokenizer:
        print(report.tokenizer)
    tell_verified(report.verified)
