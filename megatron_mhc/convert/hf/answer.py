"""What ``megatron-mhc convert`` says of models for transformers."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from megatron_mhc.convert.choices import FLAGS
from megatron_mhc.convert.hf.export import Exported, export
from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.refusal import refuse


def main(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Export and tell; 0.

    Args:
        given: options of new streams, which an export does not make.
    """
    started = time.monotonic()
    try:
        _refuse_in_vain(options, given)
        report = export(
            options.source,
            options.destination,
            step=options.step,
            dry_run=options.dry_run,
            verify=options.verify,
            overwrite=options.overwrite,
            progress=lambda nbytes: progress(nbytes, 'written', 'B'),
        )
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
    trusted = ', trust_remote_code=True' if 'auto_map' in report.config else ''
    print(f'wrote {options.destination} in {seconds:.1f} s')
    print(f"AutoModelForCausalLM.from_pretrained('{options.destination}'{trusted})")
    return 0


def _refuse_in_vain(options: argparse.Namespace, given: dict[str, Any]) -> None:
    flags = [FLAGS[name] for name in given]
    flags += ['--from'] if options.origin != 'auto' else []
    flags += ['--unchecked'] if options.unchecked else []
    if flags:
        raise ValueError(f'{", ".join(flags)}: no effect with --to hf; leave it out')


def _print(report: Exported) -> None:
    config = report.config
    residual = config.get('residual_type', 'standard')
    streams = '' if residual == 'standard' else f', {config["num_residual_streams"]} streams'
    print(
        f'{residual} -> {config["model_type"]}: {config["num_hidden_layers"]} layers{streams}, '
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
