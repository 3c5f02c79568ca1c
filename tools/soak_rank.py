"""One rank of a soak: the example script, with faults, and a record of every step.

``megatron_mhc.run tools/soak_rank.py ARGS...``; SOAK_FOLDER names the folder of the run.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from soak_faults import Injector

SCRIPT = Path(__file__).resolve().parents[1] / 'examples' / 'pretrain_gpt.py'


def resident() -> dict[str, int]:
    """KiB of memory that this process has, all of it and what is no file's."""
    lines = Path('/proc/self/status').read_text().splitlines()
    sizes = dict(line.split(':') for line in lines if line.startswith('Rss') or 'VmRSS' in line)
    return {'rss': int(sizes['VmRSS'].split()[0]), 'anon': int(sizes['RssAnon'].split()[0])}


def watched(train_step, folder: Path):
    """Megatron's ``train_step`` with what SOAK_FOLDER asks for around it."""
    from megatron.training import get_args

    rank = int(os.environ['RANK'])
    faults, record = Injector(folder, rank), (folder / f'rank-{rank}.jsonl').open('a')

    def step(*args, **kwargs):
        iteration = get_args().curr_iteration + 1
        faults.begin(iteration)
        result = train_step(*args, **kwargs)
        losses, norm = result[0], result[5]
        # Only the last stage has losses; every bit of them counts.
        values = {name: float(value).hex() for name, value in losses.items()}
        values |= {'iteration': iteration, 'norm': float(norm).hex(), **resident()}
        values |= {'files': len(os.listdir('/proc/self/fd')), 'life': os.getpid()}
        record.write(json.dumps(values) + '\n')
        record.flush()
        return result

    return step


def main() -> None:
    from megatron.training import training

    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    training.train_step = watched(training.train_step, Path(os.environ['SOAK_FOLDER']))
    sys.argv[0] = str(SCRIPT)
    script.main()


if __name__ == '__main__':
    main()
