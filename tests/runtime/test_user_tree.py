"""The launcher and the commands take the Megatron that Python would take for the script."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from launch import launch

ROOT = pathlib.Path(__file__).parents[2]
# Prints what plain Python, or the launcher, lets it find.
PROBE = """
import importlib.util, json, multiprocessing, sys

def core(_=None):
    return importlib.util.find_spec('megatron.core').origin

if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        child = pool.map(core, [0])[0]
    # setuptools adds its own to the path when Megatron imports it, as the launcher does.
    path = [entry for entry in sys.path if not entry.endswith('_vendor')]
    print(json.dumps({'path': path, 'core': core(), 'child': child, 'file': __file__,
                      'training': importlib.util.find_spec('megatron.training').origin}))
"""


def make_tree(root: pathlib.Path, minor: int = 19) -> pathlib.Path:
    """The installed Megatron under another name and version, with a script beside it."""
    installed = pathlib.Path(importlib.util.find_spec('megatron.core').origin).parent
    core = root / 'megatron' / 'core'
    core.mkdir(parents=True)
    for entry in installed.iterdir():
        (core / entry.name).symlink_to(entry)
    (core / 'package_info.py').unlink()
    (core / 'package_info.py').write_text((installed / 'package_info.py').read_text())
    with (core / 'package_info.py').open('a') as info:
        info.write(f'MINOR, PATCH = {minor}, 99\n__shortversion__ = f"0.{{MINOR}}.99"\n')
    (root / 'megatron' / 'training').symlink_to(installed.parent / 'training')
    (root / 'probe.py').write_text(PROBE)
    return root


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp('user') / 'tree')


def start(*command: object, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {'PYTHONPATH': str(ROOT), **environment}
    if command[0] != '-S' and not environment.get('PYTHONSAFEPATH'):
        return launch(0, *command, folder=cwd, **environment)
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


def seen(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def console(tmp_path_factory):
    """What pip makes of the entry point ``megatron-mhc``."""
    script = tmp_path_factory.mktemp('bin') / 'megatron-mhc'
    script.write_text('from megatron_mhc.cli import main\nmain()\n')
    return script


@pytest.mark.parametrize('safe', [False, True])
def test_the_launcher_finds_what_python_finds(tree, console, tmp_path, safe):
    environment = {'PYTHONSAFEPATH': '1'} if safe else {}
    # Another tree where the launcher is started: `python -m` has that folder first on the path.
    other = make_tree(tmp_path / 'other', minor=18)
    link = tmp_path / 'link.py'
    link.symlink_to(tree / 'probe.py')
    plain = seen(start(link, cwd=other, **environment))
    assert (str(tree) in plain['core']) != safe
    for launcher in (('-m', 'megatron_mhc.run'), (console, 'run')):
        done = start(*launcher, '../link.py', cwd=other, **environment)
        assert seen(done)['path'] == plain['path'], launcher
        assert seen(done) == plain | {'file': str(other / '../link.py')}
        folder = pathlib.Path(plain['core']).parent
        assert f'in {folder}, not patched\n' in done.stdout
        assert safe or f'[megatron-mhc] megatron-core 0.19.99 in {folder}' in done.stdout


def test_a_checkout_found_by_the_current_folder_alone_stays_importable(tree):
    """Without an installation, `python -m` finds this package in the current folder only."""
    code = 'import sys; import megatron_mhc.ops; print(sys.path)'
    (tree / 'later.py').write_text(code)
    # -S leaves out site-packages, and with it an editable installation; torch is put back.
    site = os.pathsep.join(p for p in sys.path if p.endswith('site-packages'))
    done = start('-S', '-m', 'megatron_mhc.run', tree / 'later.py', cwd=ROOT, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr[-3000:]
    path = ast.literal_eval(done.stdout.splitlines()[-1])
    assert path[0] == str(tree) and path.index(str(ROOT)) > 1
    # On PYTHONPATH it is found there, and nothing is added.
    both = os.pathsep.join([str(ROOT), site])
    done = start('-S', '-m', 'megatron_mhc.run', tree / 'later.py', cwd=tree, PYTHONPATH=both)
    assert ast.literal_eval(done.stdout.splitlines()[-1]).count(str(ROOT)) == 1


def test_commands_take_the_tree_that_they_are_started_in(tree, console, tmp_path):
    code = 'import megatron_mhc.cli as cli, sys; sys.exit(cli.main(sys.argv[1:]))'
    for command, cwd in (
        ((console, 'doctor', '--json'), tree),
        ((console, 'doctor', tree / 'probe.py', '--json'), tmp_path),
        ((console, 'doctor', tree, '--json'), tmp_path),
        (('-c', code, 'doctor', '--json'), tree),
    ):
        found = json.loads(start(*command, cwd=cwd).stdout)
        assert found['megatron-core'].startswith(f'0.19.99 in {tree}/megatron/core, not'), command
    done = start(console, 'doctor', 'absent.py', cwd=tmp_path)
    assert done.returncode == 2 and 'absent.py: no such file' in done.stderr


def test_a_child_looks_where_its_parent_does(tree):
    """`python -m` would have the current folder before everything else."""
    code = (
        'import subprocess, sys\n'
        'from megatron_mhc.runtime.script_path import same_path_for_a_child\n'
        'options, environment = same_path_for_a_child()\n'
        'code = "import os, sys; print([p for p in sys.path if os.path.exists(p)])"\n'
        'subprocess.run([sys.executable, *options, "-c", code], env=environment, cwd="/")\n'
        'exec(code)'
    )
    (tree / 'parent.py').write_text(code)
    child, parent = map(ast.literal_eval, start(tree / 'parent.py', cwd=ROOT).stdout.splitlines())
    assert child[: len(parent)] == parent and child[0] == str(tree)


def test_a_tree_needs_no_wheel_and_its_faults_are_told(tree, tmp_path):
    """Version and path come from where Python looks, not from what pip has recorded."""
    from megatron_mhc import compat

    info = tmp_path / 'megatron' / 'core' / 'package_info.py'
    info.parent.mkdir(parents=True)
    (info.parent / '__init__.py').write_text('')
    script = tmp_path / 'script.py'
    script.write_text('')
    for source, said in (
        ('__shortversion__ = "0.21.0"', 'is outside the supported range'),
        ('MAJOR = (', 'no version can be read (SyntaxError'),
        ('__shortversion__ = "x.y"', 'no version can be read (ValueError'),
        ('', 'no version can be read (KeyError'),
    ):
        info.write_text(source)
        done = start('-m', 'megatron_mhc.run', script, cwd=tmp_path)
        error = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and said in error and str(info.parent) in error, error
        assert 'Traceback' not in done.stderr
    # A user who patched such a tree has vouched for it; its seams are checked one by one.
    info.write_text('__shortversion__ = "0.21.0"')
    entry = info.parent.parent / 'training' / 'arguments.py'
    entry.parent.mkdir()
    entry.write_text('@mhc_seam("arguments", accept="6904cd4c")  # megatron-mhc\n')
    done = start(
        '-c',
        'from megatron_mhc.compat import *; print(require_supported_core(), describe_core())',
        cwd=tmp_path,
    )
    line = f'0.21.0 megatron-core 0.21.0 in {info.parent}, patched'
    assert done.stdout.strip() == line, done.stderr
    info.write_text('')
    done = start('-m', 'megatron_mhc', 'doctor', cwd=tmp_path)
    assert done.returncode == 1 and 'no version can be read (KeyError' in done.stdout
    assert compat.take_as_it_is(info.parent).startswith(f'`megatron-mhc patch {tmp_path} --apply')


def test_two_copies_of_megatron_are_not_mixed(tree, tmp_path):
    extra = tmp_path / 'other' / 'megatron'
    (extra / 'post_training').mkdir(parents=True)
    (extra / 'post_training' / '__init__.py').write_text('')
    code = (
        'import sys\n'
        f'sys.path[:0] = [{str(tree)!r}]; sys.path.append({str(extra.parent)!r})\n'
        'import megatron.core, megatron.post_training\n'
        'from megatron_mhc.compat import require_one_tree\n'
        'require_one_tree()'
    )
    # A folder that adds to the namespace is welcome; a whole other copy of Megatron is not.
    assert start('-c', code, cwd=tmp_path).returncode == 0
    (extra / 'core').mkdir()
    (extra / 'core' / 'package_info.py').write_text('')
    error = start('-c', code, cwd=tmp_path).stderr
    assert 'two copies of Megatron are mixed' in error and f'PYTHONPATH={extra.parent}' in error
