"""Train a small GPT with hyper-connections on real text, on whatever this machine has.

``train`` trains one model; ``compare`` trains standard, hc and mhc residuals on the same data, from
the same seeds. Both go through Megatron's own training loop (examples/pretrain_gpt.py), resume from
their last checkpoint, and end with a plot of the losses.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import loss_table
import plot_losses
import quickstart_flags
import supervise
from prepare_corpus import prepare

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.inputs.values import MOST_SEED, integer

ROOT = Path(__file__).resolve().parents[1]
MOST_SEEDS = 100


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='quickstart.py',
        usage='%(prog)s {train,compare} [options] [-- MEGATRON_FLAGS]',
        description=__doc__,
        epilog='Flags after a bare -- go to Megatron: train -- --lr 1e-3 --num-layers 6',
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument('task', choices=['train', 'compare'])
    parser.add_argument(
        '--iters', type=integer(1), help='iterations (default: train 300, compare 100)'
    )
    parser.add_argument(
        '--residual-type',
        choices=list(quickstart_flags.RESIDUAL),
        default='mhc',
        help='what train trains (default: mhc)',
    )
    parser.add_argument('--seed', type=integer(1, MOST_SEED), default=1234)
    parser.add_argument(
        '--seeds',
        type=integer(1, MOST_SEEDS),
        help='how many seeds compare trains, from --seed on (default: 2)',
    )
    parser.add_argument('--fresh', action='store_true', help='remove earlier runs of this task')
    parser.add_argument('--output', type=Path, default=ROOT / 'runs', help='default: runs/')
    parser.add_argument(
        '--corpus-source', type=Path, help="folder of text (default: Python's standard library)"
    )
    parser.add_argument('--corpus-glob', default='**/*.py', help='files in it (default: **/*.py)')
    # argparse cannot give what follows a bare -- to one list, so it is cut off here.
    argv, megatron = split_at(sys.argv[1:] if argv is None else argv, '--')
    options = parser.parse_args(argv)
    options.megatron = megatron
    if options.task == 'train' and options.seeds:
        parser.error(
            f'--seeds {options.seeds}: train trains one; name it with --seed, or use compare'
        )
    options.seeds = options.seeds or 2
    options.iters = options.iters or {'train': 300, 'compare': 100}[options.task]
    if options.output.exists() and not options.output.is_dir():
        parser.error(f'--output {options.output}: not a folder; name a new one')
    return options


def split_at(items: list[str], mark: str) -> tuple[list[str], list[str]]:
    at = items.index(mark) if mark in items else len(items)
    return items[:at], items[at + 1 :]


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def shown(path: Path) -> Path:
    """``path`` relative to where the user is, if it lies there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def train(run: Path, residual: str, seed: int, options: argparse.Namespace, gpus: int) -> None:
    """Train one model in the folder ``run``, or go on with it; raises what ``supervise`` does."""
    done = supervise.latest_checkpoint(run / 'checkpoints')
    if done is not None and done >= options.iters:
        print(f'{shown(run)}: already trained to iteration {done} (--iters for more, or --fresh)')
        return
    if done is not None:
        print(f'{shown(run)}: resuming at iteration {done}')
    processes, parallel = quickstart_flags.parallel(gpus)
    script = [
        *('-m', 'megatron_mhc.run', str(ROOT / 'examples' / 'pretrain_gpt.py')),
        *quickstart_flags.RESIDUAL[residual],
        *quickstart_flags.MODEL,
        *quickstart_flags.OPTIMIZER,
        *parallel,
        *quickstart_flags.schedule(options.iters, seed),
        *quickstart_flags.data(options.output / 'corpus'),
        *quickstart_flags.outputs(run),
        *options.megatron,
    ]
    launcher = ['--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', str(processes)]
    run.mkdir(parents=True, exist_ok=True)
    (run / 'command.sh').write_text(shlex.join(['torchrun', *launcher, *script]) + '\n')
    where = f'{processes} {"GPU" if gpus else "CPU"} process(es)'
    print(f'Training {residual}, seed {seed}, on {where}.')
    print(f'  command {shown(run / "command.sh")}, all output {shown(run / "train.log")}')
    command = [sys.executable, '-m', 'torch.distributed.run', *launcher, *script]
    env = quickstart_flags.environment(processes, gpus)
    supervise.run(command, env, run / 'train.log', residual)


def report(runs: dict[str, list[Path]], image: Path) -> None:
    """Plot the losses of ``runs``, a folder for each seed, and print tables of them."""
    losses = {
        name: [plot_losses.read_losses(path / 'tensorboard') for path in paths]
        for name, paths in runs.items()
    }
    data = image.with_suffix('.json')
    data.write_text(json.dumps(losses, indent=1))
    title = 'Byte-level GPT: training, and validation on held-out files'
    plot_losses.plot(losses, image, title, loss_table.source_of(data))
    print(f'\n{"residual":10} {"first validation":>22} {"last validation":>22} {"s/iteration":>12}')
    for name, paths in runs.items():
        for seed, path in zip(losses[name], paths, strict=True):
            valid = seed[plot_losses.VALID]
            ends = [f'{valid[i]:.3f} at iteration {i}' for i in (min(valid), max(valid))]
            print(f'{name:10} {ends[0]:>22} {ends[1]:>22} {seconds_per_iteration(path):12.2f}')
    print(f'(nats per byte on files not trained on; guessing all bytes alike: {math.log(256):.3f})')
    if len(runs) > 1:
        print('\n' + '\n'.join(loss_table.comparison(losses)))


def seconds_per_iteration(run: Path) -> float:
    """Median over the iteration lines of the log, in which Megatron reports milliseconds."""
    log = (run / 'train.log').read_text(errors='replace')
    return statistics.median(map(float, supervise.MILLISECONDS.findall(log))) / 1000


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    started = time.monotonic()
    folder = options.output = options.output.resolve()
    task = folder / options.task
    if options.task == 'compare':
        seeds = range(options.seed, options.seed + options.seeds)
        runs = {
            name: {seed: task / name / f'seed-{seed}' for seed in seeds}
            for name in quickstart_flags.RESIDUAL
        }
    else:
        runs = {options.residual_type: {options.seed: task / options.residual_type}}
    if options.fresh:
        for name in runs:
            shutil.rmtree(task / name, ignore_errors=True)
    try:
        source = options.corpus_source or Path(sysconfig.get_path('stdlib'))
        prepare(folder / 'corpus', source, options.corpus_glob)
        gpus = gpu_count()
        for name, of_seeds in runs.items():
            for seed, run in of_seeds.items():
                train(run, name, seed, options, gpus)
        image = task / 'losses.png'
        report({name: list(of_seeds.values()) for name, of_seeds in runs.items()}, image)
    except KeyboardInterrupt:
        sys.exit('Stopped. The same command goes on from the last checkpoint, if there is one.')
    except ValueError as error:
        refuse('quickstart.py', str(error))
    except (OSError, RuntimeError) as error:
        sys.exit(f'quickstart: error: {error}')
    print(f"""
Done in {time.monotonic() - started:.0f} s. Where to look next:
  {shown(image)}: the losses as a picture
  {sys.executable} -m tensorboard.main --logdir {shown(task)}
  {sys.executable} -m megatron_mhc report {shlex.join(str(shown(task / name)) for name in runs)}
  {shown(run / 'command.sh')}: the command, to copy and change
  {shown(run / 'checkpoints')}: Megatron checkpoints; more --iters go on from there
  tools/quickstart_flags.py: every flag of the model and its training""")


if __name__ == '__main__':
    main()
