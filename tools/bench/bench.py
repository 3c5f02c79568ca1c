"""Time the mHC ops on this machine's GPU, beside torch and every installed peer.

Measures the copy bandwidth first, then the headline shapes (n = 4, 8192 tokens), then the others.
Writes results.csv, results.md, sublayer.png and environment.json as it goes, so that a run that is
stopped or runs out of its budget keeps what it has. --device cpu is a smoke test without figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
HIDDEN, TOKENS, STREAMS = (1280, 2560, 4096, 7168), (2048, 8192, 32768), (2, 4)
# Names only, so that --help needs no torch; a test holds them against the registries.
OPS = ('sublayer', 'layer', 'fused_edge', 'mapping', 'pre', 'post', 'sinkhorn')
OURS = ('triton', 'triton-unfused', 'torch', 'torch.compile')
PEERS = (
    *('tilekernels', 'tilekernels-2', 'te', 'te-split-k', 'te-buffer'),
    *('liger', 'liger-half-phi', 'megatron', 'lucidrains'),
)
RESERVE_SECONDS = 15
"""Kept back of the budget for the report and for the measurement that is under way."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    if importlib.util.find_spec('megatron_mhc') is None:
        _refuse('megatron_mhc is not installed; pip install -e ., or run `make bench`')
    from megatron_mhc.inputs.refusal import OneLineParser
    from megatron_mhc.inputs.values import MOST_STREAMS, MOST_TOKENS, MOST_WIDTH, integer, number

    parser = OneLineParser(
        prog='bench.py', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        '--hidden-sizes',
        type=integer(1, MOST_WIDTH),
        nargs='+',
        metavar='C',
        help=f'default: {_words(HIDDEN)}',
    )
    add(
        '--tokens',
        type=integer(1, MOST_TOKENS),
        nargs='+',
        metavar='T',
        help=f's*b; default: {_words(TOKENS)}',
    )
    add(
        '--num-streams',
        type=integer(1, MOST_STREAMS),
        nargs='+',
        metavar='n',
        help=f'default: {_words(STREAMS)}',
    )
    add('--dtype', default='bf16', choices=['bf16', 'fp16', 'fp32'], help='of the streams')
    add('--ops', nargs='+', choices=OPS, default=list(OPS), metavar='OP', help=_words(OPS))
    add(
        *('--ours',),
        nargs='+',
        choices=OURS,
        metavar='NAME',
        help=f'our implementations: {_words(OURS)} (default: all; on a CPU: torch)',
    )
    add(
        *('--peers',),
        nargs='+',
        choices=[*PEERS, 'all', 'none'],
        metavar='NAME',
        help=f'all (default; on a CPU none), none, or of:\n{_words(PEERS)}',
    )
    add('--output', type=Path, help='folder (default: tools/bench/results/<gpu>-<date>)')
    add(
        '--budget-minutes',
        type=number(0, 1e6, above=True),
        default=10,
        help='then stop and report (default: 10)',
    )
    add('--quick', action='store_true', help='n = 4, 8192 tokens, C = 2560 only, fewer samples')
    add('--device', choices=['cuda', 'cpu'], default='cuda')
    options = parser.parse_args(argv)
    small = options.device == 'cpu'
    hidden, tokens, streams = HIDDEN, TOKENS, STREAMS
    if small or options.quick:
        hidden, tokens, streams = ((64,), (16,), (2, 4)) if small else ((2560,), (8192,), (4,))
    options.hidden_sizes = options.hidden_sizes or list(hidden)
    options.tokens = options.tokens or list(tokens)
    options.num_streams = options.num_streams or list(streams)
    options.ours = options.ours or (['torch'] if small else list(OURS))
    peers = options.peers or (['none'] if small else ['all'])
    options.peers = list(PEERS) if 'all' in peers else [p for p in peers if p != 'none']
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        parser.error(f'--output {options.output}: not a folder; name a new one')
    return options


def _words(values: tuple) -> str:
    return ' '.join(map(str, values))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    started = time.monotonic()
    try:
        import torch
    except ImportError:
        _refuse('torch is not installed; pip install torch, or run `make bench`')
    if options.device == 'cuda' and not torch.cuda.is_available():
        _refuse(
            'no CUDA GPU is visible to torch; run this on a machine with one '
            '(or --device cpu for a smoke test without figures)'
        )
    import bench_run

    seconds = 60 * options.budget_minutes
    deadline = started + seconds - min(RESERVE_SECONDS, seconds / 4)
    command = sys.argv[1:] if argv is None else argv
    folder = bench_run.run(options, HERE / 'results', command, deadline)
    print(f'{time.monotonic() - started:.0f} s; see {folder}/results.md')
    return 0


def _refuse(reason: str) -> NoReturn:
    print(f'bench.py: error: {reason}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    sys.exit(main())
