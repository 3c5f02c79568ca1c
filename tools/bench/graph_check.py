"""Whether CUDA graphs change what n streams train: Megatron's loop with and without them, on a GPU.

Each way of capturing trains the same few iterations as no graph does. The losses that Megatron
prints must be the same, digit for digit; times per iteration stand beside.

    python tools/bench/graph_check.py [--hidden-size 1024] [--residual-type mhc]

--device cpu trains a tiny model twice without graphs: it shows that the runs and the comparison
work, and nothing about graphs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench_megatron import LINE, model_flags, require_heads

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_WIDTH, integer

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = ('none', 'local', 'transformer_engine', 'full_iteration')
# Iterations that run before a graph is there: recording, warming up.
EAGER = 4
# iteration -> milliseconds and the loss as it is printed.
Curve = dict[int, tuple[float, str]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='graph_check.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--hidden-size', type=integer(64, MOST_WIDTH), default=1024, help='C, a multiple of 64')
    add('--num-layers', type=integer(1, 100), default=4)
    add('--seq-length', type=integer(1, 100_000), default=1024)
    add('--train-iters', type=integer(2 * EAGER, 10_000), default=12)
    add('--residual-type', choices=['hc', 'mhc'], default='mhc')
    add('--device', choices=['cuda', 'cpu'], default='cuda')
    options = parser.parse_args(argv)
    if options.device == 'cpu':
        options.hidden_size, options.num_layers, options.seq_length = 64, 1, 8
        options.train_iters = 2 * EAGER
    require_heads(parser, options.hidden_size)
    return options


def flags(options: argparse.Namespace, graphs: str, engine: bool) -> list[str]:
    """Megatron's arguments for one run; ``engine``: Transformer Engine is installed."""
    chosen = model_flags(options, engine)
    chosen += ['--global-batch-size', '4', '--lr', '1e-3', '--no-check-for-nan-in-loss-and-grad']
    chosen += ['--residual-type', options.residual_type]
    chosen += ['--mhc-kernel-backend', 'triton' if options.device == 'cuda' else 'torch']
    if graphs != 'none' and options.device == 'cuda':
        chosen += ['--cuda-graph-impl', graphs, '--mhc-cuda-graphs']
    return chosen


def curve(log: str) -> Curve:
    return {int(i): (float(time), loss) for i, time, loss in LINE.findall(log)}


def verdict(name: str, eager: Curve, graphed: Curve) -> tuple[bool, str]:
    """Whether the losses are the same, and one line that says so."""
    apart = [i for i in eager if i not in graphed or graphed[i][1] != eager[i][1]]
    if not eager or apart:
        where = f'from iteration {apart[0]} on' if apart else 'nowhere, as nothing was trained'
        return False, f'{name}: losses differ from those without graphs {where}'
    times = [statistics.median(c[i][0] for i in c if i > EAGER) for c in (eager, graphed)]
    return True, f'{name}: same losses; {times[0]:.1f} -> {times[1]:.1f} ms an iteration'


def train(options: argparse.Namespace, graphs: str, engine: bool) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'megatron_mhc.run', 'examples/pretrain_gpt.py']
    command += flags(options, graphs, engine)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONPATH': path, 'CUDA_DEVICE_MAX_CONNECTIONS': '1'}
    print('$', *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch

    if options.device == 'cuda' and not torch.cuda.is_available():
        refuse('graph_check.py', 'no CUDA GPU is visible to torch; run it where there is one')
    engine = importlib.util.find_spec('transformer_engine') is not None
    curves: dict[str, Curve] = {}
    failed = False
    for graphs in GRAPHS if options.device == 'cuda' else GRAPHS[:2]:
        if graphs == 'transformer_engine' and not engine:
            print(f'{graphs}: left out, Transformer Engine is not installed')
            continue
        done = train(options, graphs, engine)
        curves[graphs] = curve(done.stdout)
        if done.returncode:
            failed = True
            print(f'{graphs}: ended with status {done.returncode}\n{done.stderr[-3000:]}')
        elif graphs != 'none':
            same, line = verdict(graphs, curves['none'], curves[graphs])
            failed |= not same
            print(line)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
