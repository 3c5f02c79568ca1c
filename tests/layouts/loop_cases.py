"""What the tests of the real training loop share: several command lines in one world of ranks."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import torch

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
DRIVER = REPOSITORY / 'tests' / 'cpu_loop_driver.py'
TIME_LIMIT = 240

# 255 and one extra token pad to 256 under every tensor-parallel size and release.
MODEL = (
    '--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
    '--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 5 '
    '--lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --eval-iters 0 '
    '--eval-interval 1000 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 --seed 7 '
    '--save-interval 3 --num-workers 0 '
)


def resume(path):
    return f'--load {path} --ckpt-step 3 --no-load-rng '


def spawn(folder, world, cases):
    """Run ``cases`` (name -> arguments) in one world of ranks; name -> [(loss, grad norm), ...]."""
    folder = folder / f'world{world}'
    folder.mkdir()
    lines = [[name, (MODEL + arguments).split()] for name, arguments in cases.items()]
    (folder / 'cases.json').write_text(json.dumps(lines))
    # The ranks join this store instead of opening a port, which a gloo socket may hold already.
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(world):
        env = {
            **os.environ,
            'RANK': str(rank),
            'LOCAL_RANK': str(rank),
            'WORLD_SIZE': str(world),
            'LOCAL_WORLD_SIZE': str(world),
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(store.port),
            'PYTHONPATH': os.pathsep.join([*filter(None, sys.path), str(REPOSITORY)]),
        }
        command = [sys.executable, str(DRIVER), str(folder / 'cases.json'), str(folder / 'out')]
        with open(folder / f'log{rank}', 'w') as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + TIME_LIMIT
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            # A dead rank leaves the others waiting for it.
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    failed = [n for n, rank in enumerate(ranks) if rank.returncode]
    logs = {n: (folder / f'log{n}').read_text()[-3000:] for n in failed}
    assert not failed, f'ranks {failed} of {world} failed\n' + '\n'.join(logs.values())
    return json.loads((folder / 'out').read_text())
