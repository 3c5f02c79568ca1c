"""What n streams cost in Megatron's real loop: step time and memory, as one table.

Trains some iterations of one model for each run asked for, in a process of its own on every GPU of
this machine (NCCL), with Transformer Engine where it is installed: standard and mhc, in bf16 and
fp8, and mhc with F_post,res on the compute stream and on one of high priority, traced. A run that
is in the table already is not run again. --device cpu trains two iterations of a tiny model on the
emulated device: it shows that the runs work, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from bench_megatron import LINE, model_flags, require_heads

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_WIDTH, integer

ROOT = Path(__file__).resolve().parents[2]
# Run -> its flags beside the model's.
RUNS = {
    'standard-bf16': (),
    'mhc-bf16': ('--residual-type', 'mhc'),
    'standard-fp8': ('--fp8-format', 'hybrid', '--fp8-recipe', 'tensorwise'),
    'mhc-fp8': (
        *('--residual-type', 'mhc', '--fp8-format', 'hybrid'),
        *('--fp8-recipe', 'tensorwise'),
    ),
    'post-compute': ('--residual-type', 'mhc', '--mhc-post-stream', 'compute'),
    'post-high': ('--residual-type', 'mhc', '--mhc-post-stream', 'high'),
}
DEFAULT = ('standard-bf16', 'mhc-bf16', 'standard-fp8', 'mhc-fp8')
# C, layers, s, iterations, sequences of a step.
SIZES = {'cuda': (4096, 4, 4096, 20, 8), 'cpu': (64, 1, 8, 2, 1)}
MEMORY = re.compile(r'max allocated: ([\d.]+)')
FILE, MARKDOWN = 'train.json', 'train.md'


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='train_check.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = ', '.join(RUNS)
    add('--runs', nargs='+', choices=RUNS, default=list(DEFAULT), metavar='RUN', help=names)
    add('--hidden-size', type=integer(64, MOST_WIDTH), help='C, a multiple of 64')
    add('--num-layers', type=integer(1, 100))
    add('--seq-length', type=integer(1, 100_000))
    add('--train-iters', type=integer(2, 10_000), help='default: 20')
    add('--global-batch-size', type=integer(1, 10_000), help='a multiple of the GPUs')
    add('--output', type=Path, required=True, help='folder for the table and the logs')
    add('--device', choices=SIZES, default='cuda')
    options = parser.parse_args(argv)
    sizes = ('hidden_size', 'num_layers', 'seq_length', 'train_iters', 'global_batch_size')
    for name, size in zip(sizes, SIZES[options.device], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    require_heads(parser, options.hidden_size)
    return options


def flags(options: argparse.Namespace, run: str, engine: bool) -> list[str]:
    """Megatron's arguments for one run; ``engine``: Transformer Engine is installed."""
    chosen = model_flags(options, engine)
    chosen += ['--global-batch-size', str(options.global_batch_size), '--lr', '1e-4']
    chosen += RUNS[run]
    if 'mhc' in RUNS[run]:
        chosen += ['--mhc-kernel-backend', 'triton']
    if run.startswith('post-') and options.device == 'cuda':
        folder = options.output / run
        chosen += ['--profile', '--use-pytorch-profiler', '--profile-step-start', '6']
        chosen += ['--profile-step-end', '8', '--tensorboard-dir', str(folder / 'tensorboard')]
    return chosen


def train(options: argparse.Namespace, run: str, engine: bool) -> dict[str, object]:
    """The row of one run: its median step, its last loss, its memory, or why there is none."""
    if 'fp8' in run and not engine:
        return {'run': run, 'status': 'left out: fp8 needs Transformer Engine, not installed'}
    launcher = [sys.executable]
    if options.device == 'cuda':
        import torch

        count = str(torch.cuda.device_count())
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', count]
    command = [*launcher, '-m', 'megatron_mhc.run', 'examples/pretrain_gpt.py']
    command += flags(options, run, engine)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    # With one connection all streams would wait for each other.
    environment = {'CUDA_DEVICE_MAX_CONNECTIONS': '32', **os.environ, 'PYTHONPATH': path}
    print('$', *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (options.output / f'train-{run}.log').write_text(done.stdout + done.stderr)
    row: dict[str, object] = {'run': run, 'command': command}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if 'rror' in line] or ['no message']
        return row | {'status': f'failed with {done.returncode}: {lines[-1][:160]}'}
    return row | read(done.stdout)


def read(log: str) -> dict[str, object]:
    """Median milliseconds of the second half of the steps, last loss and most memory in MB."""
    steps = [(float(ms), loss) for _, ms, loss in LINE.findall(log)]
    if not steps:
        return {'status': 'failed: its output has no iteration'}
    memory = [float(megabytes) for megabytes in MEMORY.findall(log)]
    late = [ms for ms, _ in steps[len(steps) // 2 :]]
    return {
        'status': 'ok',
        'iterations': len(steps),
        'step_ms': statistics.median(late),
        'loss': float(steps[-1][1]),
        'memory_mb': max(memory, default=None),
    }


def table(rows: dict[str, dict[str, object]], facts: dict[str, str]) -> str:
    """Markdown: the runs, each beside the standard one of its precision; then the machine."""
    lines = ['| run | step, ms | of standard | memory, MB | of standard | last loss | |']
    lines.append('|---|---|---|---|---|---|---|')
    for run, row in rows.items():
        base = rows.get('standard-fp8' if 'fp8' in run else 'standard-bf16', {})
        cells = [run]
        for key in ('step_ms', 'memory_mb'):
            value, beside = row.get(key), base.get(key)
            cells.append(f'{value:.1f}' if value is not None else '-')
            cells.append(f'{value / beside:.3f}' if value and beside else '-')
        cells += [f'{row["loss"]:.4f}' if 'loss' in row else '-', str(row['status'])]
        lines.append(f'| {" | ".join(cells)} |')
    lines += ['', '| environment | |', '|---|---|']
    lines += [f'| {name} | {value} |' for name, value in facts.items()]
    return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch
    from bench_environment import describe

    if options.device == 'cuda' and not torch.cuda.is_available():
        refuse('train_check.py', 'no CUDA GPU is visible to torch; --device cpu for a smoke test')
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / FILE
    rows = json.loads(kept.read_text())['runs'] if kept.exists() else {}
    facts = describe(options.device, argv or sys.argv[1:], 'train_check.py')
    engine = importlib.util.find_spec('transformer_engine_torch') is not None
    for run in options.runs:
        if rows.get(run, {}).get('status') == 'ok':
            continue
        rows[run] = train(options, run, engine)
        print(f'{run}: {rows[run]["status"]}', flush=True)
        kept.write_text(json.dumps({'environment': facts, 'runs': rows}, indent=2) + '\n')
        (options.output / MARKDOWN).write_text(table(rows, facts))
    print((options.output / MARKDOWN).read_text())
    return int(any(str(rows[run]['status']).startswith('failed') for run in options.runs))


if __name__ == '__main__':
    sys.exit(main())
