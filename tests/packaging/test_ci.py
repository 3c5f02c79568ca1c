"""``.ci/run``, dry: every tested version has its turn, and the first failure ends it by name."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mhc.compat import PYTHON_TESTED, TESTED, TORCH_TESTED, TRITON_TESTED

ROOT = Path(__file__).resolve().parents[2]

# Stands for the environment's Python: notes what it is asked for, and installs names only.
PYTHON = f"""#!{sys.executable} -S
import os, pathlib, sys
root = pathlib.Path(__file__).parents[2]
sys.path.append(str(root / 'site'))
arguments = sys.argv[1:]
if arguments[0] == '-c':
    sys.argv = ['-c', *arguments[2:]]
    exec(arguments[1])
    sys.exit()
over = sorted(p.name for p in pathlib.Path(os.environ.get('PYTHONPATH', '/none')).glob('*-info'))
with open(root / 'log', 'a') as log:
    print(*arguments, *over, file=log)
if os.environ.get('FAILS', 'nothing') in ' '.join(arguments):
    sys.exit(7)
if 'install' in arguments:
    target = pathlib.Path(arguments[arguments.index('--target') + 1])
    name, _, version = arguments[-1].replace('-', '_').partition('==')
    for release in (f'{{name}}-{{version}}', *(['triton-3.1.4'] if name == 'torch' else [])):
        info = target / f'{{release}}.dist-info'
        info.mkdir(parents=True)
        name, _, version = release.rpartition('-')
        text = f'Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n'
        (info / 'METADATA').write_text(text)
"""
MAKE = """#!/bin/sh
echo "make $*" >> log
mkdir -p .cache/ci-runs/train .cache/ci-runs/evaluate site
echo x > .cache/ci-runs/evaluate/results_x.json
echo x > site/api.html
echo x > .cache/ci-runs/train/losses.png
echo 'resuming at iteration 20'
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    root = tmp_path / 'clone'
    for name in ('.ci/run', 'megatron_mhc/compat.py'):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, root / name)
    for path, text in ((root / '.venv/bin/python', PYTHON), (tmp_path / 'bin/make', MAKE)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    return root


def run(clone: Path, torch: str, **env: str) -> subprocess.CompletedProcess:
    installed = {'torch': f'{torch}+cu1', 'triton': '3.8.0', 'megatron-core': next(iter(TESTED))}
    for name, version in installed.items():
        info = clone / 'site' / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    path = f'{clone.parent / "bin"}:{os.environ["PATH"]}'
    return subprocess.run(
        [clone / '.ci' / 'run'],
        env=os.environ | {'PATH': path} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize('torch', TORCH_TESTED[1:])
def test_every_version_has_its_turn(clone, torch):
    done = run(clone, torch)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (clone / 'log').read_text().splitlines()
    steps = [line.strip() for line in log if line.startswith('make ')]
    wanted = ['lint', 'docs', 'types', '.venv/.evaluate', 'test ARGS=--durations=10']
    assert steps[1:6] == [f'make {target}' for target in wanted]
    assert [line.split()[-1] for line in log if 'kernels report' in line] == [
        f'triton-{version}.dist-info' for version in TRITON_TESTED
    ]
    ends = [version for version in (TORCH_TESTED[0], TORCH_TESTED[-1]) if version != torch]
    expected = [
        (
            ['contract', *(['kernels', 'residual'] if end else [])],
            {f'megatron_core-{core}', *([f'torch-{end}', 'triton-3.1.4'] if end else [])},
        )
        for core, end in itertools.zip_longest(reversed(list(TESTED)[1:]), ends)
    ]
    assert [
        (re.findall(r'tests/(\w+)', line), set(re.findall(r'(\S+)\.dist-info', line)))
        for line in log
        if line.startswith('-m pytest')
    ] == expected
    # Nothing is left of what was laid over, and the end tells what was run.
    assert not list((clone / '.cache').glob('ci-overlay*'))
    said = done.stdout.partition('all passed in')[2]
    assert f'torch {torch}, Triton 3.8.0, megatron-core' in said and 'Python 3.' in said
    for version in (*TRITON_TESTED, TORCH_TESTED[0], TORCH_TESTED[-1], *TESTED):
        assert version in said


def test_the_first_failure_ends_it_by_name(clone):
    done = run(clone, TORCH_TESTED[1], FAILS='kernels report')
    assert done.returncode == 7 and 'all passed' not in done.stdout
    (last,) = done.stderr.strip().splitlines()
    assert last.startswith('=== FAILED after ')
    assert f'spills and bytes on Triton {TRITON_TESTED[0]} (exit status 7)' in last
    assert (clone / 'log').read_text().count('kernels report') == 1
    assert not list((clone / '.cache').glob('ci-overlay*'))


def test_the_workflow_only_starts_it():
    workflow = (ROOT / '.github/workflows/ci.yml').read_text()
    assert re.findall(r'- run: (.+)', workflow) == ['.ci/run']
    assert f'python: [{", ".join(map(repr, PYTHON_TESTED))}]' in workflow


def test_nothing_depends_on_one_machine():
    settings = (ROOT / name for name in ('.github/workflows/ci.yml', 'mkdocs.yml', 'setup.py'))
    for path in (ROOT / '.ci/run', ROOT / 'Makefile', *(ROOT / 'tools').glob('*.sh'), *settings):
        for word in ('/work', '/home/', '/root', '/opt/', 'index-url http'):
            assert word not in path.read_text(), (path, word)
