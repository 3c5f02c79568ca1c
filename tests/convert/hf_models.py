"""Small models of Megatron's with random weights, as checkpoints, for tests of the exports."""

from __future__ import annotations

import contextlib
import pathlib

import pytest
import torch

from megatron_mhc.convert import verify
from megatron_mhc.convert.build import build
from megatron_mhc.convert.saved_args import own_residual
from megatron_mhc.convert.source import open_source
from megatron_mhc.settings.flags_residual import resolve_arguments

BASE = """
    --num-layers 3 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --kv-channels 8
    --max-position-embeddings 24 --transformer-impl local --attention-dropout 0
"""
LLAMA = '--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear'
UNTIED = '--untie-embeddings-and-output-weights'
GROUPED = '--group-query-attention --num-query-groups 2'
VOCABULARY = 96


@contextlib.contextmanager
def megatron(modules: pathlib.Path):
    """Megatron's groups for a world of one, on whatever device this machine has.

    Args:
        modules: where transformers copies a modelling file before it imports it.
    """
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.runtime import cpu_device

    patches = CPU_DEVICE_PATCHES if cpu_device.is_installed() else ()
    engine.apply(patches)
    try:
        with pytest.MonkeyPatch.context() as patch, verify.process_group():
            patch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(modules))
            yield
    finally:
        engine.revert(patches)


def arguments(parse, flags: str, **values):
    """What a run with these flags would have saved."""
    args = parse(*BASE.split(), *flags.split())
    args.padded_vocab_size, args.params_dtype = VOCABULARY, torch.float32
    args.bias_gelu_fusion &= args.add_bias_linear
    resolve_arguments(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def checkpoint(args, folder: pathlib.Path) -> pathlib.Path:
    """A file of the ``torch`` format with random weights, as if trained."""
    model = build(args, own_residual(args))
    with torch.no_grad():
        buffers = [(name, b) for name, b in model.named_buffers() if name.endswith('expert_bias')]
        for name, value in [*model.named_parameters(), *buffers]:
            noise = torch.randn(value.shape)
            if args.residual_type == 'hc' and 'hyper_connection' in name:
                # Without constraint, maps far from their start amplify every rounding.
                value.add_(0.1 * noise)
                continue
            value.copy_(noise * (0.3 if value.dim() == 1 else 0.1))
            if 'norm' in name and name.endswith('weight'):
                value.add_(1)
    file = folder / 'mp_rank_00' / 'model_optim_rng.pt'
    file.parent.mkdir(parents=True)
    torch.save({'args': args, 'checkpoint_version': 3.0, 'model': model.state_dict()}, file)
    return folder


def loaded(folder: pathlib.Path, **options):
    """What transformers makes of an export, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def megatron_logits(path: pathlib.Path) -> torch.Tensor:
    source = open_source(path)
    return verify.run(source, build(source.args, own_residual(source.args)))
