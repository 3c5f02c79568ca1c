"""Time every kernel of a training step by itself, for the report to show beside what it predicts.

Runs the launches that ship, as ``megatron-mhc kernels report --roofline`` predicts them, on random
tensors of their shapes, and writes ``kernels.json`` into a folder of ``results/``: the form that
``kernels/roofline/measured.py`` describes. --device cpu is a smoke test with interpreted kernels,
which writes no figures: its file names no GPU that the model knows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from functools import partial
from pathlib import Path

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_TOKENS, MOST_WIDTH, integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    import torch

    from megatron_mhc.kernels.triton.launch import Launch


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='kernel_times.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--hidden-size', type=integer(1, MOST_WIDTH), default=4096, help='C')
    add('--tokens', type=integer(1, MOST_TOKENS), default=8192, help='T, sequence times microbatch')
    add('--num-streams', type=integer(), choices=[1, 2, 4, 8], nargs='+', default=[4], metavar='n')
    add('--dtype', default='bf16', choices=['bf16', 'fp16', 'fp32'])
    add('--output', type=Path, required=True, help='folder of the run, in results/')
    add('--device', choices=['cuda', 'cpu'], default='cuda')
    return parser.parse_args(argv)


def known_gpu(name: str) -> str:
    """``NVIDIA H200`` -> ``h200``, as the model calls it; other names as they are."""
    from megatron_mhc.kernels.roofline.names import NAMES

    found = [known for known in NAMES if re.search(rf'\b{known}\b', name.lower())]
    return found[0] if found else name


def call(launch: Launch, device: str) -> object:
    """The launch on random tensors of its own on ``device``, to be called."""
    arguments = [_filled(value, device) for value in launch.arguments]
    started = launch.kernel[launch.grid]
    return partial(started, *arguments, **launch.constants, **launch.options)


def _filled(value: object, device: str) -> object:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    # Between 0 and 1, as gates and sums of squares are.
    filled: torch.Tensor = torch.rand(value.shape, device=device).to(value.dtype)
    return filled


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch

    if options.device == 'cuda' and not torch.cuda.is_available():
        refuse('kernel_times.py', 'no CUDA GPU is visible to torch; --device cpu for a smoke test')
    import triton
    from bench_timer import make_timer

    from megatron_mhc.kernels.defaults import DTYPES
    from megatron_mhc.kernels.roofline.measured import FILE
    from megatron_mhc.kernels.shipped import shipped_launches
    from megatron_mhc.kernels.verdict import label

    dtype = getattr(torch, DTYPES[options.dtype])
    timer = make_timer(options.device)
    found: dict[str, float] = {}
    for n in options.num_streams:
        for launch in shipped_launches(n, options.hidden_size, options.tokens, dtype):
            size = sum(tensor.numel() * tensor.element_size() for tensor in launch.tensors)
            calls = [call(launch, options.device) for _ in range(timer.copies(size))]
            name = f'{label(launch)} {n}'
            found[name] = round(1e6 * timer.measure(timer.modes[0], calls).median, 2)
            print(f'{name}: {found[name]:.1f} us ({timer.label})', flush=True)
    cuda = options.device == 'cuda'
    run = {
        'gpu': known_gpu(torch.cuda.get_device_name()) if cuda else 'none, interpreted on a CPU',
        'hidden_size': options.hidden_size,
        'tokens': options.tokens,
        'dtype': options.dtype,
        'triton': triton.__version__,
        'torch': torch.__version__,
        'date': f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}',
        'command': ['python', 'tools/bench/kernel_times.py', *(argv or sys.argv[1:])],
        'microseconds': found,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / FILE).write_text(json.dumps(run, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
