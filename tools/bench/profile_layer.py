"""Trace forward and backward of one mHC layer (two sublayers) with torch.profiler.

Prints each kernel's share of the device time and writes a Chrome trace (chrome://tracing or
https://ui.perfetto.dev). --device cpu shows that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_STREAMS, MOST_TOKENS, MOST_WIDTH, integer

TRACE = Path(__file__).resolve().parents[2] / 'runs' / 'layer_trace.json'


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='profile_layer.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--hidden-size', type=integer(1, MOST_WIDTH), help='C (default: 2560; on a CPU: 64)')
    add('--tokens', type=integer(1, MOST_TOKENS), help='s*b (default: 8192; on a CPU: 16)')
    add('--num-streams', type=integer(1, MOST_STREAMS), default=4)
    add('--dtype', default='bf16', choices=['bf16', 'fp16', 'fp32'])
    add('--contender', help='a name of bench.py --ours or --peers (default: triton; CPU: torch)')
    add(
        '--steps', type=integer(1, 10_000), default=5, help='traced steps, after as many to warm up'
    )
    add('--rows', type=integer(1), default=20, help='lines of the table')
    add('--output', type=Path, default=TRACE, help='Chrome trace (default: runs/layer_trace.json)')
    add('--device', choices=['cuda', 'cpu'], default='cuda')
    options = parser.parse_args(argv)
    small = options.device == 'cpu'
    options.hidden_size = options.hidden_size or (64 if small else 2560)
    options.tokens = options.tokens or (16 if small else 8192)
    options.contender = options.contender or ('torch' if small else 'triton')
    return options


def table(times: dict[str, tuple[float, int]], steps: int, rows: int) -> list[str]:
    """Lines of ``{name: (microseconds, calls)}``, the longest first, as shares of the whole."""
    total = sum(us for us, _ in times.values()) or 1.0
    lines = [f'{"share":>6} {"us/step":>10} {"calls/step":>10}  kernel']
    ranked = sorted(times.items(), key=lambda item: -item[1][0])
    for name, (us, calls) in ranked[:rows]:
        lines.append(f'{us / total:6.1%} {us / steps:10.1f} {calls / steps:10.1f}  {name[:90]}')
    if len(ranked) > rows:
        us = sum(us for _, (us, _) in ranked[rows:])
        lines.append(f'{us / total:6.1%} {us / steps:10.1f} {"":10}  {len(ranked) - rows} others')
    lines.append(f'{"":6} {total / steps:10.1f} {"":10}  total')
    return lines


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch
    from bench_calls import build
    from bench_cases import make_inputs
    from bench_ours import OURS
    from bench_peers import PEERS
    from torch.profiler import ProfilerActivity, profile

    from megatron_mhc.kernels.peers.contender import Case, availability

    cuda = options.device == 'cuda'
    kinds = {kind.name: kind for kind in (*OURS, *PEERS)}
    problem = ''
    if cuda and not torch.cuda.is_available():
        problem = 'no CUDA GPU is visible to torch (--device cpu for a smoke test)'
    elif options.contender not in kinds:
        problem = f'--contender {options.contender}: choose from {", ".join(kinds)}'
    else:
        usable, remark = availability(kinds[options.contender])
        problem = '' if usable else f'{options.contender}: {remark}'
    if problem:
        refuse('profile_layer.py', problem)
    case = Case(options.hidden_size, options.tokens, options.num_streams, options.dtype)
    call = build('layer', kinds[options.contender](case), make_inputs(case, options.device, 0))
    for _ in range(options.steps):
        call.both()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as trace:
        for _ in range(options.steps):
            call.both()
        if cuda:
            torch.cuda.synchronize()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(options.output))
    times: dict[str, tuple[float, int]] = {}
    for event in trace.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        # On a GPU, host functions carry the time of what they launched once more.
        if us > 0 and not (cuda and event.device_type == torch.autograd.DeviceType.CPU):
            times[event.key] = (us, event.count)
    print(f'{options.contender}, {case}: layer forward + backward on {options.device}')
    print('\n'.join(table(times, options.steps, options.rows)))
    print(f'trace: {options.output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
