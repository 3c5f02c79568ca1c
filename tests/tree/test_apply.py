"""Lines go in and come out exactly, in all files or none, and pass calls on until switched."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
from sample_tree import FILES, IDS, contents, execute

from megatron_mhc.patches import engine
from megatron_mhc.patches.placed import PLACED
from megatron_mhc.tree import write as tree_write
from megatron_mhc.tree.edit import fingerprint, seam_line

ROOT = pathlib.Path(__file__).parents[2]


def test_check_is_the_default_and_changes_nothing(tree, patch):
    before = contents(tree)
    code, out, _ = patch()
    assert code == 0 and f'{len(IDS)} ready' in out
    for id, place in (
        ('plain', 'megatron/core/plain.py:7'),
        ('windows', 'megatron/core/windows.py:3'),
        ('imported', 'megatron/core/package/helpers.py:7'),
    ):
        line = next(line for line in out.splitlines() if line.startswith(f'{id} '))
        assert place in line and f'reason of {id}' in line
    assert patch('--check') == (code, out, '') and contents(tree) == before


def test_apply_adds_whole_lines_and_reverse_takes_them_out(tree, patch):
    before = contents(tree)
    code, out, _ = patch('--apply')
    assert code == 0 and all(f'reason of {id}' in out for id in IDS) and 'no git here' in out
    after = contents(tree)
    assert after.keys() == before.keys()
    for name, old in before.items():
        new = after[name].splitlines(keepends=True)
        added = [line for line in new if b'mhc_seam' in line]
        assert b''.join(line for line in new if b'mhc_seam' not in line) == old
        assert all(len(line.rstrip()) <= 100 for line in added)
        # One line a seam, one import a file; CRLF in a file of CRLF.
        seams = [id for id in IDS if f'("{id}")'.encode() in after[name]]
        assert len(added) == (len(seams) + 1 if seams else 0)
        assert all(line.endswith(b'\r\n') == (b'\r\n' in old) for line in added)
    code, out, _ = patch()
    assert code == 0 and f'{len(IDS)} applied' in out
    # Once more: nothing to do.
    assert f'already applied: {len(IDS)} ' in patch('--apply')[2] and contents(tree) == after
    assert patch('--reverse')[0] == 0 and contents(tree) == before
    assert 'nothing to take out' in patch('--reverse')[1]


def test_lines_stand_above_the_decorators_and_below_the_imports(tree, patch):
    patch('--apply')
    lines = (tree / 'megatron/core/kinds.py').read_text().splitlines()
    for id, decorator in (('class-method', '\t@classmethod'), ('cached', '\t@staticmethod')):
        assert lines[lines.index('\t' + seam_line(id)) + 1] == decorator
    lines = (tree / 'megatron/core/plain.py').read_text().splitlines()
    assert lines[2] == 'import os' and lines[3].startswith('from megatron_mhc.seam')
    assert lines[-1] == 'import sys'
    helpers = (tree / 'megatron/core/package/helpers.py').read_text()
    assert ast.get_docstring(ast.parse(helpers)) == 'Two\nlines.'


def test_seams_pass_calls_on_until_they_are_switched(tree, patch):
    patch('--apply')
    work = execute(tree, 'megatron/core/plain.py')['work']
    kinds = execute(tree, 'megatron/core/kinds.py')['Kinds']
    assert work(1, 2, b=3) == (1, (2,), 3) and work.warned is False
    assert kinds.make(5, x=6) == (kinds, 5, {'x': 6}) and kinds().make(5) == (kinds, 5, {})
    assert kinds.cached(4) == 4 and kinds().cached(4) == 4
    for id in ('plain', 'class-method', 'cached'):
        seam = PLACED[id]
        seam.current = lambda *args, original=seam.original, **more: ('ours', original(*args))
    # Also for a caller that took the name before.
    assert work(1) == ('ours', (1, (), 1)) and kinds.cached(4) == ('ours', 4)
    assert kinds.make(5) == ('ours', (kinds, 5, {}))


def test_the_engine_switches_a_seam_instead_of_rebinding(tree, patch, monkeypatch):
    patch('--apply')
    work = execute(tree, 'megatron/core/plain.py')['work']
    minor = engine.core_minor(engine.core_version())
    # The target is in no module: what counts is where the seam was put.
    sample = engine.Patch(
        id='plain',
        target='megatron.core.no_such_module:work',
        wrap=lambda original: lambda *args, **more: ('ours', original(*args, **more)),
        reason='test',
        fingerprints={minor: engine.fingerprint(FILES['plain'][3])},
    )
    engine.apply((sample,))
    engine.apply((sample,))
    assert work(1) == ('ours', (1, (), 1))
    engine.revert((sample,))
    assert work(1) == (1, (), 1)


def test_all_files_change_or_none(tree, patch, monkeypatch):
    before, replace, calls = contents(tree), os.replace, []

    def fail_at_the_third(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise OSError('disk full')
        replace(*paths)

    monkeypatch.setattr(tree_write.os, 'replace', fail_at_the_third)
    code, _, error = patch('--apply')
    assert code == 2 and 'disk full' in error and len(calls) == 5
    assert contents(tree) == before


def test_permissions_and_links_survive(tree, patch):
    plain, real = tree / 'megatron/core/plain.py', tree / 'real.py'
    plain.rename(real)
    plain.symlink_to(real)
    real.chmod(0o755)
    patch('--apply')
    assert plain.is_symlink() and b'mhc_seam' in real.read_bytes()
    assert real.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize('name', ['megatron/core/plain.py', 'megatron/core/package', 'megatron'])
def test_nothing_is_written_through_a_link_that_leaves_the_tree(tree, patch, tmp_path, name):
    outside = tmp_path / 'outside'
    (tree / name).rename(outside)
    (tree / name).symlink_to(outside)
    before = contents(tree), contents(tmp_path)
    for flag in ('--apply', '--diff'):
        code, _, error = patch(flag)
        assert code == 2 and error.count('\n') == 1, error
        assert f'a link leads to {outside}' in error and 'put a copy in its place' in error
    assert (contents(tree), contents(tmp_path)) == before
    # Nor are lines taken out of what lies there.
    (tree / name).unlink()
    outside.rename(tree / name)
    patch('--apply')
    (tree / name).rename(outside)
    (tree / name).symlink_to(outside)
    patched = contents(tmp_path)
    patch('--reverse')
    left = contents(tmp_path)
    assert all(left[name] == patched[name] for name in left if name.startswith('outside'))


def test_without_the_package_the_error_names_the_way_back(tree, patch):
    patch('--apply')
    done = subprocess.run(
        [sys.executable, '-S', '-E', 'megatron/core/plain.py'],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "No module named 'megatron_mhc'" in done.stderr
    assert 'undo with patch --reverse' in done.stderr


def test_neither_torch_nor_megatron_is_needed(tree):
    blocked = 'import sys; sys.modules["torch"] = sys.modules["megatron"] = None\n'
    code = blocked + f'from megatron_mhc.cli import main; main(["patch", {str(tree)!r}])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert 'megatron-core 0.19.1' in done.stdout, done.stderr


def test_fingerprints_read_are_fingerprints_seen(random_seed):
    draw = random.Random(random_seed)
    for _ in range(100):
        names = [f'p{n}' for n in draw.sample(range(99), draw.randint(0, 6))]
        cut = sorted(draw.randint(0, len(names)) for _ in range(2))
        parts = names[: cut[0]] + (['/'] if cut[0] else [])
        parts += [f'{name}: int = 0' for name in names[cut[0] : cut[1]]]
        parts = [p if p == '/' or '=' in p else f'{p}=1' for p in parts]
        keywords = [draw.choice([name, f'{name}=2']) for name in names[cut[1] :]]
        parts += [draw.choice(['*', '*rest']) if keywords else draw.choice(['*rest', '**more'])]
        code = f'def f({", ".join(parts + keywords)}): pass'
        space = {}
        exec(code, space)
        assert fingerprint(ast.parse(code).body[0]) == engine.fingerprint(space['f']), code


def test_the_seams_are_those_of_the_registry():
    from megatron_mhc.patches import seam_table

    remedy = 'run python -m megatron_mhc.patches.seam_table'
    assert json.loads((ROOT / 'patches/seams.json').read_text()) == seam_table.rows(), remedy
    readme = (ROOT / 'patches/README.md').read_text()
    table = readme.partition(seam_table.BEGIN)[2].partition(seam_table.END)[0]
    assert table == seam_table.table(), remedy
