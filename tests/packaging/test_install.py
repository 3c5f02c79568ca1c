"""Every way of installing gives the same modules: the folders linked into the package are in it.

Environments are made without dependencies and nothing imports torch, so this stays fast.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ('kernels', 'patches', 'schedules')
IGNORED = shutil.ignore_patterns(
    '.git', '.venv*', '.cache', '.ruff_cache', '.pytest_cache', '.hypothesis', '__pycache__',
    'build', 'dist', 'runs', 'site', '*.egg-info'
)  # fmt: skip

# Finds files without running the package, which would import torch.
PROBE = """
import importlib.machinery, importlib.metadata, json, os, sys
spec = importlib.machinery.PathFinder.find_spec('megatron_mhc')
if spec is None:  # an editable install may bring a finder of its own
    import importlib.util
    spec = importlib.util.find_spec('megatron_mhc')
top = os.path.dirname(spec.origin)
files = []
for folder, names, leaves in os.walk(top, followlinks=True):
    names[:] = [name for name in names if name != '__pycache__']
    files += [os.path.relpath(os.path.join(folder, leaf), top) for leaf in leaves]
try:
    scripts = [e.value for e in importlib.metadata.entry_points(name='megatron-mhc')]
except importlib.metadata.PackageNotFoundError:
    scripts = []
print(json.dumps({'top': top, 'files': sorted(files), 'scripts': scripts}))
"""

# Imports one leaf of every linked folder with stand-ins for torch and the package's own __init__.
RESOLVE = """
import importlib.util, json, sys, types
package = types.ModuleType('megatron_mhc')
spec = importlib.util.find_spec('megatron_mhc')
package.__path__ = list(spec.submodule_search_locations)
sys.modules['megatron_mhc'] = package
found = {}
for name in json.loads(sys.argv[1]):
    found[name] = importlib.util.find_spec(name).origin
bare = [n for n in ('kernels', 'patches', 'schedules') if n in sys.modules]
print(json.dumps({'found': found, 'bare': bare}))
"""


# The help of every command, in one process: torch is imported once.
HELP = """
import contextlib, io, json
import megatron_mhc.cli
said = {}
for name in megatron_mhc.cli.COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            megatron_mhc.cli.main([name, '--help'])
        except SystemExit as ended:
            assert not ended.code, (name, ended.code)
    said[name] = text.getvalue()
print(json.dumps({'file': megatron_mhc.__file__, 'said': said}))
"""


def run(*command, cwd: Path, env: dict | None = None) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean | {'PIP_DISABLE_PIP_VERSION_CHECK': '1'} | (env or {}),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
    return result.stdout


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('elsewhere')


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, links kept, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp('tree') / 'repo'
    shutil.copytree(ROOT, copy, symlinks=True, ignore=IGNORED)
    return copy


@pytest.fixture(scope='module')
def expected(tree) -> list[str]:
    """What the checkout holds, read from the top-level folders rather than through the links."""
    package = tree / 'megatron_mhc'
    own = (p.relative_to(package) for p in package.rglob('*.py'))
    files = {path for path in own if path.parts[0] not in LINKED}
    files |= {p.relative_to(tree) for name in LINKED for p in (tree / name).rglob('*.py')}
    return sorted(map(str, files | {Path('py.typed')}))


@pytest.fixture(scope='module')
def wheel(tree) -> Path:
    return build(tree, 'wheel')


def build(tree: Path, kind: str) -> Path:
    target = tree.parent / f'{kind}-of-{tree.name}'
    run(sys.executable, '-m', 'build', '--no-isolation', f'--{kind}', '-o', target, cwd=tree)
    (path,) = target.iterdir()
    # Left-over build folders would let a later build ship files that are gone.
    shutil.rmtree(tree / 'build', ignore_errors=True)
    return path


def environment(folder: Path, *pip: object) -> Path:
    """A fresh environment with ``pip install ARGS``; sees the outer one's build tools."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / 'bin' / 'python'
    install = [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet']
    run(*install, '--no-deps', '--no-index', '--no-build-isolation', *pip, cwd=folder)
    return python


def check(python, cwd: Path, expected: list[str], env: dict | None = None) -> dict:
    seen = json.loads(run(python, '-c', PROBE, cwd=cwd, env=env))
    code = [f for f in seen['files'] if f.endswith(('.py', 'py.typed'))]
    assert sorted(code) == expected
    names = [
        'megatron_mhc.' + f.removesuffix('.py').replace(os.sep, '.').removesuffix('.__init__')
        for f in expected
        if f.split(os.sep)[0] in LINKED
    ]
    # Parents of nested modules would run their __init__; one level is resolved without that.
    names = [name for name in names if name.count('.') == 2]
    result = json.loads(run(python, '-c', RESOLVE, json.dumps(names), cwd=cwd, env=env))
    assert result['bare'] == []
    for name, origin in result['found'].items():
        assert Path(origin).is_relative_to(seen['top']), name
    return seen


def test_wheel(wheel, expected, elsewhere, tree, tmp_path):
    python = environment(tmp_path / 'venv', wheel)
    seen = check(python, elsewhere, expected)
    assert 'site-packages' in seen['top']
    assert set(seen['scripts']) == {'megatron_mhc.cli:main'}
    assert (python.parent / 'megatron-mhc').exists()
    # No top-level name but the package itself may leak into site-packages.
    site = Path(seen['top']).parent
    assert {p.name.split('-')[0] for p in site.iterdir()} == {'megatron_mhc'}
    # From the root of a checkout the checkout wins, wholly.
    assert check(python, tree, expected)['top'] == str(tree / 'megatron_mhc')


def test_a_wheel_has_the_guides_the_page_and_the_licence(wheel, tree):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith('.dist-info/METADATA'))
        facts = archive.read(metadata).decode().partition('\n\n')[0]
    pages = {path.relative_to(tree) for path in (tree / 'megatron_mhc' / 'docs').iterdir()}
    assert len(pages) > 10 and set(map(str, pages)) <= set(names)
    assert 'megatron_mhc/monitor/page.html' in names
    assert any(name.endswith('/LICENSE') for name in names)
    assert 'Author: The megatron-mhc authors' in facts and 'License: Apache-2.0' in facts
    # Sources of the site, tests and notes stay behind.
    assert not [name for name in names if name.endswith(('.yml', '.cff')) or 'tests' in name]


def test_every_command_answers_from_another_folder(wheel, elsewhere, tmp_path):
    python = environment(tmp_path / 'venv', wheel)
    # Without torch, as in an environment that holds nothing but the wheel.
    page = run(python.parent / 'megatron-mhc', 'docs', 'schedules', cwd=elsewhere)
    assert page == (ROOT / 'schedules' / 'README.md').read_text()
    (site,) = (tmp_path / 'venv').glob('lib/python3.*/site-packages')
    path = {'PYTHONPATH': str(site)}
    found = json.loads(run(sys.executable, '-c', HELP, cwd=elsewhere, env=path))
    assert Path(found['file']).is_relative_to(site)
    for name, text in found['said'].items():
        assert text.startswith(f'usage: megatron-mhc {name}'), (name, text)


def test_sdist_builds_the_same_wheel(tree, wheel, expected, elsewhere, tmp_path):
    shutil.unpack_archive(build(tree, 'sdist'), tmp_path / 'sources', filter='data')
    (sources,) = (tmp_path / 'sources').iterdir()
    again = build(sources, 'wheel')
    assert again.name == wheel.name
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
    check(environment(tmp_path / 'venv', again), elsewhere, expected)


def test_editable(tree, expected, elsewhere, tmp_path):
    # Like pip itself, the editable build needs setuptools, which the bare environment lacks.
    outer = os.pathsep.join(p for p in sys.path if p.endswith('site-packages'))
    folder = tmp_path / 'venv'
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / 'bin' / 'python'
    install = [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps']
    command = [*install, '--no-index', '--no-build-isolation', '--editable', tree]
    run(*command, cwd=elsewhere, env={'PYTHONPATH': outer})
    seen = check(python, elsewhere, expected)
    assert seen['top'] == str(tree / 'megatron_mhc')
    assert (python.parent / 'megatron-mhc').exists()


def test_path_only(tree, expected, elsewhere):
    python = Path(sys.executable)
    # -S leaves out site-packages, where another copy may be installed.
    names = {'PYTHONPATH': str(tree)}
    seen = json.loads(run(python, '-S', '-c', PROBE, cwd=elsewhere, env=names))
    assert seen['top'] == str(tree / 'megatron_mhc')
    assert [f for f in seen['files'] if f.endswith(('.py', 'py.typed'))] == expected


def test_sources_without_links_are_refused(tree, tmp_path):
    copy = tmp_path / 'repo'
    shutil.copytree(tree, copy, symlinks=True, ignore=IGNORED)
    for name in LINKED:
        (copy / 'megatron_mhc' / name).unlink()
    result = subprocess.run(
        [sys.executable, 'setup.py', '--version'], cwd=copy, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert 'symbolic links were lost' in result.stderr
