"""``examples/schedule_plain_torch.py``: a plan without Megatron equals one process."""

import pathlib
import subprocess
import sys

EXAMPLE = pathlib.Path(__file__).parents[2] / 'examples' / 'schedule_plain_torch.py'


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLE, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_plan_is_drawn_and_equals_one_process():
    done = run('--recompute')
    assert done.returncode == 0, done.stderr
    first, second, *_, last = done.stdout.splitlines()
    assert first == 'dualpipev-w: 2 ranks, 8 microbatches' and second.startswith('total time ')
    assert 'rank 0 ' in done.stdout and 'rank 1 ' in done.stdout
    assert last.endswith('8 losses and 16 gradients equal those of one process, bit for bit')


def test_numbers_without_a_plan_are_one_line():
    done = run('--ranks', '4', '--microbatches', '2')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        'error: dualpipev-w needs at least 2 x pp = 8 microbatches, got 2: use zb-v or 1f1b, or '
        'more microbatches'
    )
