"""A forked rank is what the process would be that it stands for."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys
import time

import pytest
from launch import launch, start

SHOWN = 'import os, sys; print((sys.argv, sys.path, os.getcwd(), __name__, os.environ["PLACE"]))'


def as_process(*words: object, folder: pathlib.Path, **environment: str) -> tuple:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


@pytest.mark.parametrize('how', ['script', 'link', 'module', 'code'])
def test_arguments_path_and_environment(tmp_path, how):
    (tmp_path / 'inner').mkdir()
    (tmp_path / 'inner' / 'shown.py').write_text(SHOWN)
    (tmp_path / 'link.py').symlink_to('inner/shown.py')
    words = {
        'script': ('inner/shown.py',),
        'link': ('link.py',),
        'module': ('-m', 'inner.shown'),
        'code': ('-c', SHOWN),
    }
    command = (*words[how], 'a b', '--flag')
    path = os.pathsep.join(['inner', str(tmp_path.parent), os.environ.get('PYTHONPATH', '')])
    environment = {'PLACE': 'here', 'PYTHONPATH': path}
    wanted = as_process(*command, folder=tmp_path, **environment)
    done = launch(0, *command, folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == wanted


def test_ranks_meet_and_the_first_to_fail_ends_the_others(tmp_path):
    code = (
        'import os, sys, time, torch\n'
        'torch.distributed.init_process_group("gloo")\n'
        'x = torch.ones(1); torch.distributed.all_reduce(x)\n'
        'os.write(1, b"sum %d\\n" % x.item())\n'
        'if os.environ["RANK"] == "1": sys.exit("no such expert")\n'
        'if len(sys.argv) > 1: time.sleep(600)\n'
    )
    done = launch(2, '-c', code, 'wait', timeout=60)
    assert done.stdout.splitlines() == ['sum 2', 'sum 2']
    assert done.returncode == 1 and 'no such expert' in done.stderr


def test_a_rank_that_does_not_end_is_killed(tmp_path):
    code = (
        'import os, pathlib, signal, sys, time\n'
        'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
        'pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n'
        'time.sleep(600)\n'
    )
    mark = tmp_path / 'pid'
    running = start(0, '-c', code, mark)
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        running.result(timeout=0.01)
    deadline = time.monotonic() + 60
    while pathlib.Path('/proc', mark.read_text()).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not pathlib.Path('/proc', mark.read_text()).exists()


def test_what_libraries_read_at_import_cannot_differ():
    with pytest.raises(AssertionError, match='TRITON_INTERPRET is read at import'):
        launch(0, '-c', '', TRITON_INTERPRET='no')
