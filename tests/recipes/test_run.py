"""A recipe, scaled down, through the launcher: all of its flags and both ends of a V."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LINE = re.compile(r'iteration +(\d+)/.*throughput.*lm loss: (\S+) ')


@pytest.mark.parametrize(('layout', 'schedule'), [('1gpu', False), ('8gpu', True)])
def test_a_scaled_down_recipe_trains(layout, schedule):
    """27 B in 6 layers: latent attention, a dense layer, experts, streams, a pipeline."""
    done = subprocess.run(
        [
            *(sys.executable, 'examples/recipe.py', '27b', '--layout', layout, '--scale-down'),
            *('--', '--train-iters', '5', '--eval-interval', '100'),
        ],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [float(loss) for _, loss in LINE.findall(done.stdout)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1
    assert ('pipeline schedule dualpipev-w: 2 ranks' in done.stdout) == schedule
