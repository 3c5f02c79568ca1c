"""What ``megatron-mhc convert`` says of models for transformers."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from megatron_mhc.convert.choices import FLAGS, HF
from megatron_mhc.convert.hf.export import Exported, export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse


def main(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Export and tell; 0.

    Args:
        given: options of new streams, which an export does not make.
    """
    started = time.monotonic()
    common = {
        'dry_run': options.dry_run,
        'verify': options.verify,
        'overwrite': options.overwrite,
        'progress': lambda nbytes: progress(nbytes, 'written', 'B'),
    }
    out = options.to == HF
    try:
        _refuse_in_vain(options, given)
        if out:
            report = export(options.source, options.destination, step=options.step, **common)
        else:
            report = restore(options.source, options.destination, **common)
    except (ValueError, OSError) as error:
        refuse('megatron-mhc convert', str(error))
    seconds = time.monotonic() - started
    if options.json:
        print(as_json(dataclasses.asdict(report) | {'seconds': round(seconds, 1)}))
        return 0
    _print(report)
    if options.dry_run:
        print('dry run: nothing was written')
        return 0
    print(f'wrote {options.destination} in {seconds:.1f} s')
    if out:
        trusted = ', trust_remote_code=True' if 'auto_map' in report.config else ''
        print(f"AutoModelForCausalLM.from_pretrained('{options.destination}'{trusted})")
    else:
        print(f'train on with --load {options.destination}, a release')
    return 0


def _refuse_in_vain(options: argparse.Namespace, given: dict[str, Any]) -> None:
    flags = [FLAGS[name] for name in given]
    origins = ('auto',) if options.to == HF else ('auto', HF)
    flags += ['--from'] if options.origin not in origins else []
    flags += ['--step'] if options.step is not None and options.to != HF else []
    flags += ['--unchecked'] if options.unchecked else []
    if flags:
        raise ValueError(f'{", ".join(flags)}: no effect with --to {options.to}; leave it out')


def _print(report: Exported) -> None:
    config = report.config
    residual = config.get('residual_type', 'standard')
    streams = '' if residual == 'standard' else f', n = {config["num_residual_streams"]}'
    print(
        f'{residual}: {config["num_hidden_layers"]} layers{streams}, C = {config["hidden_size"]}, '
        f'{report.tensors} tensors, {report.nbytes:,} bytes, {config["dtype"]}'
    )
    if report.dropped:
        print(f'{report.dropped} entries of multi-token prediction left out')
    if report.tokenizer:
        print(report.tokenizer)
    if report.verified:
        print(
            'verified: largest difference of {compared} logits {difference:.3e}, the largest of '
            'which is {largest:.3e}'.format(**report.verified)
        )
