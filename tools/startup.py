"""What start-up costs each rank of a large job, and all of them: time, files opened, bytes read.

    python tools/startup.py --ranks 10000 --pipeline 16 64 --microbatches 256 2048

Ranks differ in what they check: the first one proves the plan and looks at every file of the
checkpoint, the first of each node reads the checkpoint's arguments, every rank makes its own part
of the plan. One process of each kind is started, with the environment it would have, up to where
process groups are made; its figures times their number are the job's. The checkpoint is written
here, with as many files and entries as the job's would have.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from megatron_mhc.inputs.as_json import as_json
from megatron_mhc.inputs.refusal import OneLineParser
from megatron_mhc.inputs.table import table
from megatron_mhc.inputs.values import integer

KINDS = {
    # kind -> whether it is the first of its node, and of its pipeline
    'node and pipeline': (True, True),
    'node': (True, False),
    'pipeline': (False, True),
    'neither': (False, False),
}


class Meter:
    """CPU seconds, files opened below ``folder`` and bytes of them since the last ``lap``."""

    def __init__(self, folder: str) -> None:
        self._folder, self._opened = folder, 0
        sys.addaudithook(self._hear)
        self._last = time.process_time(), 0, self._read()

    def _hear(self, event: str, args: tuple) -> None:
        if event in ('open', 'os.listdir') and str(args[0]).startswith(self._folder):
            self._opened += 1

    def _read(self) -> int:
        lines = Path('/proc/self/io').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('rchar'))

    def lap(self) -> dict[str, float]:
        now = time.process_time(), self._opened, self._read()
        spent = dict(
            zip(
                ('seconds', 'opened', 'read'),
                map(float.__sub__, *(tuple(map(float, values)) for values in (now, self._last))),
                strict=True,
            )
        )
        self._last = now
        return spent


def one_rank(folder: str, schedule: str, sizes: list[list[int]], leads: bool) -> dict:
    """What this process, a rank as its environment says, spends on each phase."""
    meter = Meter(folder)
    from megatron_mhc.bootstrap import prepare

    prepare('cpu')
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mhc.pipeline import proof
    from megatron_mhc.settings.pipeline import PipelineConfig

    spent = {'imports': meter.lap()}
    ranks, microbatches = sizes[0]
    batch = microbatches * (int(os.environ['WORLD_SIZE']) // ranks)
    flags = (
        f'--num-layers {2 * ranks} --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 '
        f'--global-batch-size {batch} --pipeline-model-parallel-size {ranks} '
        f'--pipeline-schedule {schedule} --residual-type mhc --load {folder}'
    )
    add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    spent['command line'] = meter.lap()

    class Group:
        """A pipeline whose other ranks agree."""

        def size(self) -> int:
            return ranks

        def rank(self) -> int:
            return 0 if leads else ranks // 2

    proof.dist.get_process_group_ranks = lambda group: list(range(group.size()))
    proof.dist.broadcast_object_list = lambda *_, **__: None
    for ranks, microbatches in sizes:
        proof.proved_plan(PipelineConfig(schedule), Group(), microbatches, False, False)
        spent[f'plan {ranks} x {microbatches}'] = meter.lap()
    return spent


def write_checkpoint(folder: Path, files: int, entries: int) -> None:
    """A ``torch_dist`` checkpoint of ``files`` files with ``entries`` parts each, all zeros."""
    warnings.simplefilter('ignore')
    import torch
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    here = folder / 'iter_0000001'
    here.mkdir(parents=True)
    (folder / 'latest_checkpointed_iteration.txt').write_text('1')
    (here / 'metadata.json').write_text('{"sharded_backend": "torch_dist"}')
    args = argparse.Namespace(residual_type='mhc', mhc_norm_eps=1e-6, iteration=1)
    torch.save({'args': args, 'iteration': 1}, here / 'common.pt')
    save({'weight': torch.zeros(1)}, storage_writer=FileSystemWriter(here), no_dist=True)
    with (here / '.metadata').open('rb') as file:
        metadata = pickle.load(file)
    properties = TensorProperties(dtype=torch.float32)
    for number in range(entries):
        name, chunks = f'decoder.layers.{number}.weight', []
        for part in range(files):
            offsets = torch.Size([part])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size([1])))
            place = _StorageInfo(f'__{part}_0.distcp', number, 1)
            metadata.storage_data[MetadataIndex(name, offsets)] = place
        size = torch.Size([files])
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, size, chunks)
    (here / '.metadata').write_bytes(pickle.dumps(metadata))
    for part in range(files):
        with (here / f'__{part}_0.distcp').open('ab') as file:
            file.truncate(max(entries, file.tell()))


def started(kind: str, rank: int, options: argparse.Namespace, folder: Path) -> dict:
    """The figures of one process."""
    sizes = [[p, m] for p in options.pipeline for m in options.microbatches]
    first, leads = KINDS[kind]
    where = {'RANK': rank, 'LOCAL_RANK': 0 if first else 1, 'WORLD_SIZE': options.ranks}
    where |= {'LOCAL_WORLD_SIZE': options.ranks, 'OMP_NUM_THREADS': 1, 'PYTHONWARNINGS': 'ignore'}
    request = json.dumps([str(folder), options.schedule, sizes, leads])
    done = subprocess.run(
        [sys.executable, __file__, '--one-rank', request],
        env=os.environ | {name: str(value) for name, value in where.items()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f'a rank ended with status {done.returncode}:\n{done.stderr[-3000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def counted(options: argparse.Namespace) -> dict[str, int]:
    """How many ranks are of each kind, without the first of all."""
    pipelines = options.ranks // options.pipeline[0]
    found = dict.fromkeys(KINDS, 0)
    for rank in range(1, options.ranks):
        places = rank % options.ranks_per_node == 0, rank < pipelines
        found[next(kind for kind, own in KINDS.items() if own == places)] += 1
    return found


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog='startup.py', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--ranks', type=integer(2), default=10000)
    parser.add_argument('--ranks-per-node', type=integer(1), default=8)
    parser.add_argument('--pipeline', type=integer(2), nargs='+', default=[16, 64], metavar='P')
    parser.add_argument('--microbatches', type=integer(1), nargs='+', default=[256, 2048])
    parser.add_argument('--schedule', default='dualpipev-w')
    parser.add_argument(
        '--entries', type=integer(1), default=30, help='tensors of the checkpoint, one part a rank'
    )
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--one-rank', help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one_rank:
        print(json.dumps(one_rank(*json.loads(options.one_rank))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, options.ranks, options.entries)
        numbers = {'first of all': 1, **counted(options)}
        measured = {
            kind: started('node and pipeline' if number == 0 else kind, number, options, folder)
            for number, kind in enumerate(numbers)
        }
    rows = [
        {'ranks': kind, 'number': numbers[kind], 'phase': phase, **spent}
        for kind, phases in measured.items()
        for phase, spent in phases.items()
    ]
    if options.json:
        print(as_json(rows))
        return 0
    lines = [('first of', 'number', 'phase', 'CPU s', 'opened', 'MB read', 'job: CPU h', 'GB')]
    for row in rows:
        hours, much = row['number'] * row['seconds'] / 3600, row['number'] * row['read'] / 1e9
        lines.append(
            (
                row['ranks'],
                f'{row["number"]:,}',
                row['phase'],
                f'{row["seconds"]:.2f}',
                f'{row["opened"]:.0f}',
                f'{row["read"] / 1e6:.1f}',
                f'{hours:.2f}',
                f'{much:,.1f}',
            )
        )
    print(*table(lines), sep='\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
