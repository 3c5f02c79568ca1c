"""Soak Megatron's real loop: thousands of small steps, ranks that die, and a curve that must not.

For each schedule one undisturbed run, then the same run with ranks killed, cut off, stopped and
slowed at seeded times; it goes on from its last checkpoint until it is done. Two pipeline stages,
two replicas, experts, dropout, a distributed optimizer, on an emulated device:

    nice -n 15 python tools/soak.py runs/soak --iterations 2000

Checked: nothing hangs, no process is left behind, a line names the rank, memory stays flat, and the
curve is bit for bit the undisturbed one. OUT/soak.json has the figures.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import quickstart_flags
import soak_faults
import supervise

from megatron_mhc.inputs.refusal import OneLineParser
from megatron_mhc.inputs.values import integer

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
# Megatron has whole minutes: after one, a wait for a rank that is stopped ends.
MODEL = """
    --num-layers 4 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2
    --seq-length 16 --max-position-embeddings 16 --disable-bias-linear --swiglu
    --normalization RMSNorm --untie-embeddings-and-output-weights
    --num-experts 2 --moe-router-topk 1 --moe-router-pre-softmax --moe-layer-freq 2
    --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --residual-type mhc --mhc-num-residual-streams 2 --mhc-sinkhorn-iterations 2
    --hidden-dropout 0.1 --attention-dropout 0
    --pipeline-model-parallel-size 2 --expert-model-parallel-size 2
    --use-distributed-optimizer --overlap-grad-reduce --distributed-timeout-minutes 1
    --micro-batch-size 1 --global-batch-size 8 --mock-data --split 100,0,0 --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-3 --lr-decay-style constant
    --eval-iters 0 --eval-interval 1000000 --log-interval 10
""".split()
# The loop's own limit, torchrun's patience with a stopped rank, and room for a busy machine.
BOUNDS = {'kill': 60, 'drop': 60, 'stop': 150}
SILENCE = 300
# Of the undisturbed run, until memory must be flat; and how flat.
WARM_UP, FLAT = 0.2, 0.02
# What names the rank: a survivor, or the launcher, which may end survivors before they can speak.
NAMED = re.compile(r'rank \d+ ended first|no rank has said|failed \(exitcode: -?\d+\)')


def command(run: Path, schedule: str, iterations: int, every: int) -> list[str]:
    """What each rank runs, for Python; it goes on where ``run`` has a checkpoint."""
    return [
        *('-m', 'megatron_mhc.run', str(ROOT / 'tools' / 'soak_rank.py'), *MODEL),
        *('--pipeline-schedule', schedule, '--train-iters', str(iterations)),
        *('--save', str(run / 'checkpoints'), '--load', str(run / 'checkpoints')),
        *('--save-interval', str(every)),
    ]


def under_torchrun(run: Path, words: list[str]) -> None:
    """One life of the ranks; raises RuntimeError where one of them ended it."""
    launcher = ['--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', str(RANKS)]
    line = [sys.executable, '-m', 'torch.distributed.run', *launcher, *words]
    env = quickstart_flags.environment(RANKS, gpus=0) | {'SOAK_FOLDER': str(run)}
    supervise.run(line, env, run / 'train.log', run.name, silence=SILENCE)


def survive(
    run: Path, faults: list[soak_faults.Fault], words: list[str], live: Callable[..., None]
) -> dict:
    """Run to the end through ``faults``; returns what each life ended of."""
    shutil.rmtree(run, ignore_errors=True)
    soak_faults.write(run, faults)
    (run / 'train.log').touch()
    ends: list[dict] = []
    while True:
        before, at = set(soak_faults.fired(run)), (run / 'train.log').stat().st_size
        try:
            live(run, words)
        except RuntimeError as error:
            ended = time.time()
            deadly = {f: t for f, t in soak_faults.fired(run).items() if f.kind in BOUNDS}
            new = [fault for fault in deadly if fault not in before]
            if not new:
                raise RuntimeError(f'{run}: a life ended without a fault: {error}') from error
            with (run / 'train.log').open(errors='replace') as log:
                log.seek(at)
                said = next(filter(NAMED.search, log), None)
            seconds = ended - deadly[new[0]]
            ends.append({**new[0]._asdict(), 'took': seconds, 'said': said, 'left': left_of(run)})
            supervise.latest_checkpoint(run / 'checkpoints')
        else:
            slow = sum(fault.kind == 'slow' for fault in soak_faults.fired(run))
            return {'ends': ends, 'slow': slow}


def left_of(run: Path) -> int:
    """Processes of ``run`` that still live after it has ended."""
    mark, left = str(run), 0
    for process in psutil.process_iter():
        try:
            left += process.pid != os.getpid() and process.environ().get('SOAK_FOLDER') == mark
        except psutil.Error:
            # Another user's, or gone.
            continue
    return left


def records(run: Path, rank: int) -> list[dict]:
    lines = (run / f'rank-{rank}.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(run: Path) -> dict[int, set[tuple]]:
    """Iteration -> what the last rank saw there, in all lives: losses and norm, to the bit."""
    seen: dict[int, set[tuple]] = {}
    for record in records(run, RANKS - 1):
        bits = sorted((name, value) for name, value in record.items() if isinstance(value, str))
        seen.setdefault(record['iteration'], set()).add(tuple(bits))
    return seen


def growth(run: Path) -> dict[str, float]:
    """Most that a rank's memory, and its open files, grew after the warm-up, as a fraction."""
    found = {'rss': 0.0, 'anon': 0.0, 'files': 0.0}
    for rank in range(RANKS):
        rows = records(run, rank)
        warm = rows[int(len(rows) * WARM_UP) :]
        for name in found:
            found[name] = max(found[name], max(row[name] for row in warm) / warm[0][name] - 1)
    return found


def judge(still: Path, shaken: Path, lives: dict, iterations: int) -> tuple[dict, list[str]]:
    """``(figures, what is wrong)`` of an undisturbed run and the same with faults."""
    wanted, seen = curve(still), curve(shaken)
    grown, wrong = growth(still), []
    different = [i for i in range(1, iterations + 1) if seen.get(i) != wanted.get(i)]
    if different or len(wanted) != iterations or any(len(bits) > 1 for bits in wanted.values()):
        wrong.append(f'{len(different)} iterations differ, the first ones {different[:5]}')
    if grown['rss'] > FLAT:
        wrong.append(f'memory grew by {grown["rss"]:.1%} after the warm-up')
    for end in lives['ends']:
        name = f'{end["kind"]} of rank {end["rank"]} in iteration {end["iteration"]}'
        if end['took'] > BOUNDS[end['kind']]:
            wrong.append(f'{name}: the job ended after {end["took"]:.0f} s')
        if end['said'] is None:
            wrong.append(f'{name}: no line names a rank')
        if end['left']:
            wrong.append(f'{name}: {end["left"]} processes were left')
    replayed = sum(1 for _ in records(shaken, RANKS - 1)) - len(seen)
    slowest = {
        kind: max((e['took'] for e in lives['ends'] if e['kind'] == kind), default=0.0)
        for kind in BOUNDS
    }
    figures = {'iterations': iterations, 'replayed': replayed, 'lives': len(lives['ends']) + 1}
    return figures | {'growth': grown, 'slowest end': slowest, **lives, 'wrong': wrong}, wrong


def soak(
    out: Path, schedule: str, options: argparse.Namespace, live: Callable[..., None]
) -> tuple[dict, list[str]]:
    still, shaken = out / f'{schedule}-still', out / f'{schedule}-shaken'
    counts = {kind: getattr(options, kind) for kind in soak_faults.KINDS}
    faults = soak_faults.draw(options.seed, options.iterations, RANKS, counts)
    for run, planned in ((still, []), (shaken, faults)):
        words = command(run, schedule, options.iterations, options.save_interval)
        lives = survive(run, planned, words, live)
    return judge(still, shaken, lives, options.iterations)


def told(schedule: str, figures: dict) -> str:
    ends, grown = figures['slowest end'], figures['growth']
    kinds = [end['kind'] for end in figures['ends']]
    verdict = '; '.join(figures['wrong']) or 'the curve is bit for bit the undisturbed one'
    return (
        f'{schedule}: {figures["iterations"]} iterations in {figures["lives"]} lives, '
        f'{figures["replayed"]} replayed; {kinds.count("kill")} ranks killed (the job ended within '
        f'{ends["kill"]:.0f} s), {kinds.count("drop")} cut off ({ends["drop"]:.0f} s), '
        f'{kinds.count("stop")} stopped ({ends["stop"]:.0f} s), {figures["slow"]} slow; memory of '
        f'the undisturbed run +{grown["rss"]:.2%} after its warm-up, open files '
        f'+{grown["files"]:.0%}; {verdict}.'
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog='soak.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', metavar='OUT', type=Path, help='folder of the runs')
    parser.add_argument('--schedules', nargs='+', default=['dualpipev-w', '1f1b'], metavar='NAME')
    parser.add_argument('--iterations', type=integer(2), default=2000)
    parser.add_argument('--save-interval', type=integer(1), default=25)
    parser.add_argument('--seed', type=integer(0), default=1)
    for kind, count in (('kill', 8), ('drop', 4), ('stop', 2), ('slow', 40)):
        parser.add_argument(f'--{kind}', type=integer(0), default=count, metavar='TIMES')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, live: Callable[..., None] = under_torchrun) -> int:
    options = parse(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results, failed = {}, 0
    for schedule in options.schedules:
        results[schedule], wrong = soak(out, schedule, options, live)
        failed += len(wrong)
        (out / 'soak.json').write_text(json.dumps(results, indent=1))
        print(told(schedule, results[schedule]), flush=True)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
