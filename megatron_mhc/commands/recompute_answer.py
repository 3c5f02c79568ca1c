"""Answers ``megatron-mhc recompute``: layers are built, run once, and their bytes counted."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_mhc.commands.recompute import HEADS
from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.quiet import quiet
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.kernels.defaults import KERNEL_STREAMS
from megatron_mhc.settings.recompute_cost import kept_cost, segment_cost, whole_cost

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlock
    from torch import Tensor

    from megatron_mhc.settings.residual import ResidualConfig

PROGRAM = 'megatron-mhc recompute'
UNIT = 'C values a token'
HEAD = (
    *('L', 'segments', 'L_r', 'kept: mHC', 'formula', 'peak: mHC', 'formula'),
    *('all: kept', 'peak'),
)


class Row(NamedTuple):
    """Bytes after the forward, and the most in the backward: of all, and of hyper-connections."""

    kept: int
    kept_by_mhc: int
    peak: int
    peak_of_mhc: int


def _estimated_bytes(options: argparse.Namespace) -> int:
    """Weights and their gradients, and what the forward of the longest row keeps, in fp32."""
    n, width, length = options.num_streams, options.hidden_size, max(options.sublayers)
    weights = 6 * width * width + (n * n + 2 * n) * n * width
    return 4 * length * (2 * weights + options.tokens * width * (3 * n + 8))


def main(options: argparse.Namespace) -> int:
    """Print one row for each L and kind of segment; 0."""
    import torch

    from megatron_mhc.settings.residual import ResidualConfig

    if options.hidden_size % HEADS:
        refuse(PROGRAM, f'--hidden-size {options.hidden_size}: wanted a multiple of {HEADS}, heads')
    interpreted = options.kernel_backend == 'triton' and not torch.cuda.is_available()
    if interpreted and not os.environ.get('TRITON_INTERPRET'):
        refuse(PROGRAM, '--kernel-backend triton: no GPU; set TRITON_INTERPRET=1 to interpret them')
    n = options.num_streams
    if options.kernel_backend == 'triton' and n not in KERNEL_STREAMS:
        known = ', '.join(map(str, sorted(KERNEL_STREAMS)))
        refuse(
            PROGRAM, f'--num-residual-streams {n} with --kernel-backend triton: use one of {known}'
        )
    least = min(options.sublayers)
    if 2 * options.full > least:
        refuse(
            PROGRAM,
            f'--recompute-num-layers {options.full}: --num-sublayers {least} are {least // 2} '
            'layers; use at most that',
        )
    size, room = _estimated_bytes(options), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if size > room:
        refuse(
            PROGRAM,
            f'--num-sublayers {max(options.sublayers)} --num-residual-streams {n} --hidden-size '
            f'{options.hidden_size} --tokens {options.tokens}: about {size / 2**30:.0f} GiB, more '
            f'than the {room / 2**30:.0f} GiB of this machine; give smaller ones',
        )
    try:
        residuals = [
            ResidualConfig(
                num_residual_streams=n,
                kernel_backend=options.kernel_backend,
                recompute_layer_num=kind,
            )
            for kind in options.segments
        ]
    except ValueError as error:
        refuse(PROGRAM, str(error))
    with quiet():
        start_megatron()
        rows = [*_measured(options, residuals)]
    if options.json:
        about = {'num_residual_streams': n, 'hidden_size': options.hidden_size}
        print(json.dumps(about | {'tokens': options.tokens, 'unit': UNIT, 'rows': rows}, indent=2))
    else:
        print(*table([HEAD, *map(_cells, rows)], '>'), sep='\n')
    return 0


def _measured(
    options: argparse.Namespace, residuals: list[ResidualConfig]
) -> Iterator[dict[str, Any]]:
    """One row for each L and kind of segment, as plain values: C values a token."""
    n, value = options.num_streams, 4 * options.tokens * options.hidden_size
    with progress(len(options.sublayers) * len(residuals), 'recompute') as advance:
        for sublayers in options.sublayers:
            for residual in residuals:
                layers = build(sublayers // 2, residual, options.hidden_size, options.full)
                row = measure(layers, options.tokens, n * options.hidden_size)
                size = layers.layers[0].recompute_segment_size
                # What a checkpoint keeps and recomputes is not in the formula.
                formula = (None, None) if options.full else costs(n, sublayers, size)
                yield {
                    'sublayers': sublayers,
                    'segments': residual.recompute_layer_num,
                    'segment_size': size or None,
                    **{key: bytes_ / value for key, bytes_ in row._asdict().items()},
                    'kept_by_formula': formula[0],
                    'peak_by_formula': formula[1],
                }
                advance(1)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    keys = ('sublayers', 'segments', 'segment_size', 'kept_by_mhc', 'kept_by_formula')
    values = [row[key] for key in (*keys, 'peak_of_mhc', 'peak_by_formula', 'kept', 'peak')]
    return tuple(
        '-' if value is None else f'{value:z.1f}' if isinstance(value, float) else str(value)
        for value in values
    )


def costs(n: int, sublayers: int, size: int) -> tuple[int, int]:
    """What the formula says of the two columns of mHC."""
    if not size:
        return whole_cost(n, sublayers), whole_cost(n, sublayers)
    return kept_cost(n, sublayers, size), segment_cost(n, sublayers, size)


def start_megatron() -> None:
    """Megatron's parallel state for one process; a CUDA device is emulated where there is none."""
    import torch

    from megatron_mhc.runtime import cpu_device

    if not torch.cuda.is_available():
        cpu_device.install()
        from megatron_mhc.patches import engine
        from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES

        engine.apply(CPU_DEVICE_PATCHES)
    from megatron.core import parallel_state, tensor_parallel

    store = f'file://{tempfile.mkdtemp()}/store'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)


def build(
    num_layers: int, residual: ResidualConfig, hidden_size: int, full: int = 0, **settings: Any
) -> TransformerBlock:
    """A block of ``num_layers`` local layers as in a middle pipeline stage, in fp32.

    Args:
        num_layers: each of two sublayers.
        residual: its settings.
        hidden_size: C.
        full: layers of a checkpoint under full recomputation, 0 for none.
        settings: more of the ``TransformerConfig``.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc.residual.block import widen_block
    from megatron_mhc.residual.spec import with_residual

    recompute = {
        'recompute_granularity': 'full',
        'recompute_method': 'uniform',
        'recompute_num_layers': full,
    }
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        normalization='RMSNorm',
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **(recompute if full else {}),
        **settings,
    )
    spec = with_residual(get_gpt_layer_local_spec(normalization='RMSNorm'), residual)
    block = TransformerBlock(config, spec, pre_process=False, post_process=False)
    widen_block(block, residual)
    return block.cuda()


def measure(block: TransformerBlock, tokens: int, width: int) -> Row:
    """Run ``block`` forward and backward on random streams of that ``width`` and count bytes."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from megatron_mhc.commands.storage_meter import StorageMeter
    from megatron_mhc.residual.hyper_connection import HyperConnection

    device = next(block.parameters()).device

    def forward() -> tuple[Tensor, Tensor]:
        x = torch.randn(tokens, 1, width, device=device, requires_grad=True)
        block.set_input_tensor(x)
        return x, block(None, None)

    # Attention masks are cached, and gradients of parameters have their place.
    forward()[1].sum().backward()
    meter = StorageMeter()
    for module in block.modules():
        if isinstance(module, HyperConnection):
            # What these own is counted, on this instance alone.
            module.forward = meter.owned(module.forward)  # type: ignore[method-assign]
            module.post = meter.owned(module.post)  # type: ignore[method-assign]
    with meter:
        x, output = forward()
        grad = torch.randn_like(output)
        # As before it is sent: its values go to the next stage.
        schedules.deallocate_output_tensor(output, True)
        kept = meter.alive()
        meter.peak()
        schedules.custom_backward(output, grad)
        peak = meter.peak()
    return Row(kept.total - grad.nbytes, kept.owned + x.nbytes, peak.total, peak.owned + x.nbytes)
