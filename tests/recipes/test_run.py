"""A recipe, scaled down, through the launcher: all of its flags and both ends of a V."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from launch import launch

ROOT = pathlib.Path(__file__).parents[2]
LINE = re.compile(r'iteration +(\d+)/.*throughput.*lm loss: (\S+) ')


def recipe(name: str, *options: str, **environment: str) -> str:
    """What ``examples/recipe.py NAME OPTIONS`` prints, started from the repository."""
    done = subprocess.run(
        [sys.executable, 'examples/recipe.py', name, '--scale-down', *options],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_losses(printed: str, fall: float = 0.1) -> None:
    losses = [float(loss) for _, loss in LINE.findall(printed)]
    assert len(losses) == 5 and losses[-1] < losses[0] - fall


SHORT = '-- --train-iters 5 --global-batch-size 8 --eval-interval 100 --eval-iters 0'.split()


def test_a_scaled_down_recipe_trains():
    """27 B in 6 layers: latent attention, a dense layer, experts, streams."""
    printed = recipe('27b', '--layout', '1gpu', *SHORT)
    check_losses(printed)
    assert 'pipeline schedule' not in printed


def test_a_scaled_down_recipe_trains_on_a_v(tmp_path):
    """With two pipeline stages and two expert-parallel ranks: the ranks that its script starts."""
    world, printed = launched(tmp_path, '27b')
    check_losses(printed)
    assert world == 4 and 'pipeline schedule dualpipev-w: 2 ranks' in printed


def test_a_scaled_down_hybrid_recipe_trains(tmp_path):
    """Layers of one sublayer each, on two stages of a pattern, and two tensor ranks."""
    world, printed = launched(tmp_path, 'nemotron-h-8b')
    # Its learning rate is a third of the other's.
    check_losses(printed, 0.05)
    (pattern,) = re.findall(r'hybrid_layer_pattern \.+ (\S+)\n', printed)
    assert world == 4 and pattern.count('|') == 1 and pattern.replace('|', '') == 'M-*-M-'


def launched(tmp_path: pathlib.Path, name: str) -> tuple[int, str]:
    """Ranks of the script of a scaled-down recipe on 8gpu, and what they print."""
    script = recipe(name, '--layout', '8gpu', '--print', *SHORT)
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = script.replace(sys.executable, str(python))
    words = subprocess.check_output(['bash', '-c', script], text=True).splitlines()
    world = int(words[words.index('--nproc-per-node') + 1])
    module = words.index('-m', words.index('-m') + 1)
    done = launch(world, *words[module:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return world, done.stdout
