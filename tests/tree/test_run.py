"""A patched tree's own pretrain script, without launcher, trains as the launcher does."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from launch import launch

from megatron_mhc.tree.plan import plan_additions
from megatron_mhc.tree.scan import Tree
from megatron_mhc.tree.write import replace_all

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'pretrain_gpt.py'
# Tied embeddings and a schedule on the inverted V: every kind of seam but those of experts.
FLAGS = (
    '--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
    '--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --train-iters 3 '
    '--eval-iters 0 --eval-interval 9 --log-interval 1 --split 98,1,1 --num-workers 0 '
    '--hidden-dropout 0 --attention-dropout 0 --pipeline-model-parallel-size 2 --residual-type mhc '
    '--num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule zb-v'
).split()
# What the launcher does for a machine without CUDA and a wheel without Makefile, before the script.
DEVICE = """
import os
if 'LOCAL_RANK' in os.environ:
    import torch
    from megatron_mhc.runtime import cpu_device
    from megatron_mhc.patches import engine
    if not torch.cuda.is_available():
        cpu_device.install()
        from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
        engine.apply(CPU_DEVICE_PATCHES)
    from megatron_mhc.patches.dataset_helpers import DATASET_HELPERS_PATCH
    engine.apply((DATASET_HELPERS_PATCH,))
"""


LINE = re.compile(r'lm loss: (\S+) .*grad norm: (\S+)')


def train(*command: str, path: tuple[str, ...]) -> list[tuple[str, str]]:
    """Loss and gradient norm of every iteration, as printed."""
    start = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    done = subprocess.run(
        [*start, *command, *FLAGS],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'PYTHONWARNINGS': 'ignore',
            'PYTHONPATH': os.pathsep.join((*path, str(ROOT), os.environ.get('PYTHONPATH', ''))),
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return LINE.findall(done.stdout)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason='needs two devices'
)
def test_a_patched_tree_trains_as_the_launcher_does(tmp_path):
    import megatron.core

    installed = pathlib.Path(megatron.core.__file__).parent.parent
    shutil.copytree(installed, tmp_path / 'megatron')
    shutil.copy(SCRIPT, tmp_path / SCRIPT.name)
    tree = Tree(tmp_path)
    plan = plan_additions(tree, tree.findings(), untested=False)
    replace_all({file: new for file, (_, new) in plan.items()})
    (tmp_path / 'device').mkdir()
    (tmp_path / 'device' / 'sitecustomize.py').write_text(DEVICE)
    script = tmp_path / SCRIPT.name
    assert 'megatron_mhc' not in script.read_text()
    ours = train(str(script), path=(str(tmp_path), str(tmp_path / 'device')))
    launcher = launch(2, '-m', 'megatron_mhc.run', SCRIPT, *FLAGS)
    assert len(ours) == 3 and ours == LINE.findall(launcher.stdout)
