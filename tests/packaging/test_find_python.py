"""``tools/find_python.sh``: which Python the environment is made with, and one fetched by uv."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIND = Path(__file__).resolve().parents[2] / 'tools' / 'find_python.sh'
NONE = 'No Python >= 3.12 found: install one'
# What the script runs, without a Python beside it as /usr/bin may have.
NEEDED = ('sh', 'dirname', 'tr', 'sed', 'mktemp', 'rm', 'sleep', 'mkdir', 'ln')


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def system(tmp_path) -> Path:
    """A folder for PATH that has no Python."""
    folder = tmp_path / 'system'
    folder.mkdir()
    for name in NEEDED:
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.fixture
def find(system, tmp_path):
    def run(**env: str) -> subprocess.CompletedProcess:
        clean = {
            'PYTHON': '',
            'PATH': str(system),
            'HOME': str(tmp_path / 'home'),
            'PYENV_ROOT': '/none',
        }
        return subprocess.run([FIND], env=clean | env, capture_output=True, text=True, timeout=60)

    return run


def test_a_python_that_does_not_run_is_passed_over(find, system, tmp_path):
    shim = executable(tmp_path / 'shims' / 'python3.12', 'echo "not found" >&2; exit 127')
    good = tmp_path / 'pyenv/versions/3.12.9/bin/python3.12'
    good.parent.mkdir(parents=True)
    good.symlink_to(sys.executable)
    later = find(PATH=f'{shim.parent}:{good.parent}:{system}')
    assert later.stdout.strip() == str(good) and not later.stderr
    found = find(PATH=f'{shim.parent}:{system}', PYENV_ROOT=str(tmp_path / 'pyenv'))
    assert found.stdout.strip() == str(good) and not found.stderr
    named = find(PYTHON=str(shim))
    assert named.returncode == 1 and f'PYTHON={shim} cannot be used' in named.stderr


# A uv that fetches this Python.
UV = f"""
[ "$1 $2 $3" = 'python install 3.12' ] || exit 2
mkdir -p "$UV_PYTHON_INSTALL_DIR/cpython-3.12.9-linux/bin"
ln -s {sys.executable} "$UV_PYTHON_INSTALL_DIR/cpython-3.12.9-linux/bin/python3.12"
"""


def fetched(done: subprocess.CompletedProcess, tmp_path: Path) -> None:
    root = tmp_path / 'home/.local/share/uv/python'
    assert done.returncode == 0
    assert done.stdout.strip() == str(root / 'cpython-3.12.9-linux/bin/python3.12')
    (line,) = done.stderr.splitlines()
    assert line == f'No Python >= 3.12 found: fetching one with uv, 30 MB, into {root}.'


def test_uv_on_the_path_fetches_one_once(find, system, tmp_path):
    executable(system / 'uv', UV)
    fetched(find(), tmp_path)
    again = find()
    assert again.returncode == 0 and 'cpython-3.12.9' in again.stdout and not again.stderr


def test_pip_of_an_old_python_brings_uv(find, system, tmp_path):
    uv = executable(tmp_path / 'wheel' / 'uv', UV)
    # Only `-m pip install --target FOLDER uv` works: it is too old, and sees no venv module.
    executable(
        system / 'python3',
        '[ "$1 $2 $3 $4 $6" = "-m pip install --target uv" ] || exit 1\n'
        f'mkdir -p "$5/bin" && ln -s {uv} "$5/bin/uv" && echo "$5" > {tmp_path}/private',
    )
    fetched(find(), tmp_path)
    assert not Path((tmp_path / 'private').read_text().strip()).exists()


@pytest.mark.parametrize(
    ('name', 'text'),
    [('uv', 'echo "error: no network" >&2; exit 2'), ('python3', 'exit 1'), ('none', '')],
)
def test_what_cannot_be_fetched_is_asked_for(find, system, name, text):
    executable(system / name, text)
    done = find()
    assert done.returncode == 1 and not done.stdout
    tried, last = done.stderr.splitlines()
    assert 'fetching one with uv' in tried
    assert last.startswith(NONE) and 'make train PYTHON=' in last


def test_a_uv_that_hangs_is_ended(find, system):
    text = FIND.read_text()
    assert 'bounded 300 "$uv"' in text and 'bounded 120 python3' in text
    short = executable(system.parent / 'tools' / 'find_python.sh', '')
    short.write_text(text.replace('bounded 300', 'bounded 2'))
    executable(system / 'uv', 'sleep 600')
    done = subprocess.run(
        [short],
        env={'PATH': str(system), 'HOME': str(system.parent), 'PYENV_ROOT': '/none'},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(NONE)
