"""What the tests of the real training loop share: several command lines in one world of ranks."""

from __future__ import annotations

import json
import pathlib

from launch import launch

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
    done = launch(world, DRIVER, folder / 'cases.json', folder / 'out', timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / 'out').read_text())
