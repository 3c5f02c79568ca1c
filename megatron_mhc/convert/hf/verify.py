"""Run a checkpoint in Megatron and what was exported of it in transformers, on the same tokens.

    python -m megatron_mhc.convert.hf.verify CHECKPOINT FOLDER

Both in fp32 on the CPU, in a process of its own, as ``convert.verify``.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.convert import verify, worker
from megatron_mhc.convert.build import build
from megatron_mhc.convert.source import open_source
from megatron_mhc.settings.flags_residual import saved_residual_config

# Of the largest logit: the rounding of sums in another order.
ROUNDING = 1e-4


def require_equal(checkpoint: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """``difference``, ``largest`` and how many were ``compared``.

    Raises:
        ValueError: the logits differ by more than rounding, or a model cannot be run.
    """
    try:
        found: dict[str, float] = worker.answer(__spec__.name, str(checkpoint), str(folder))
    except worker.NoAnswer as error:
        raise ValueError(
            f'--verify: the two models could not be run ({error}); leave it out'
        ) from None
    # Of a NaN neither is true.
    if not found['difference'] <= ROUNDING * found['largest']:
        raise ValueError(
            f'--verify: logits differ by {found["difference"]:.2e}, where the largest is '
            f'{found["largest"]:.2e}, so nothing was written; please report it'
        )
    return found


def exported_logits(folder: pathlib.Path, tokens: Tensor, **options: Any) -> Tensor:
    """``[2, s, vocabulary]`` of what transformers makes of the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True, **options
    )
    # As it is loaded: without dropout.
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def main(argv: list[str]) -> None:
    from megatron_mhc.bootstrap import prepare

    prepare('cpu')
    checkpoint, folder = map(pathlib.Path, argv)
    source = open_source(checkpoint)
    with verify.process_group():
        model = build(source.args, saved_residual_config(source.args))
        expected = verify.run(source, model)
    with tempfile.TemporaryDirectory() as modules:
        # Where transformers copies the modelling file before it imports it.
        os.environ['HF_MODULES_CACHE'] = modules
        got = exported_logits(folder, verify.random_tokens(source.args))
    verify.print_difference(expected, got)


if __name__ == '__main__':
    main(sys.argv[1:])
