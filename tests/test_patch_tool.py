"""``megatron-mhc patch`` on small trees that the test makes, with fingerprints of its own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from megatron_mhc import tree_scan, tree_write
from megatron_mhc.cli import main
from megatron_mhc.patches import engine
from megatron_mhc.seam import PLACED
from megatron_mhc.tree_edit import seam_line

ROOT = pathlib.Path(__file__).parent.parent
INFO = 'MAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ""\n'
GIT = ('git', '-c', 'user.name=t', '-c', 'user.email=t@t', '-c', 'core.autocrlf=false')

# id -> (target, file, source, a function with the same parameters)
FILES = {
    'plain': (
        'megatron.core.plain:work',
        'megatron/core/plain.py',
        b'"""Doc."""\nfrom __future__ import annotations\nimport os\n\n\n'
        b'# pylint: disable=x\ndef work(a, *rest, b=1):\n    return a, rest, b\n\n\n'
        b'work.warned = False\nimport sys\n',
        lambda a, *rest, b=1: None,
    ),
    'windows': (
        'megatron.core.windows:Box.open',
        'megatron/core/windows.py',
        b'import os\r\nclass Box:\r\n    def open(self, x):\r\n        return x',
        lambda self, x: None,
    ),
    'class-method': (
        'megatron.core.kinds:Kinds.make',
        'megatron/core/kinds.py',
        b'class Kinds:\n\t@classmethod\n\tdef make(cls, a, /, **more):\n\t\treturn cls, a, more\n'
        b'\n\t@staticmethod\n\t@__import__("functools").lru_cache(\n\t\tmaxsize=1,\n\t)\n'
        b'\tdef cached(a):\n\t\treturn a\n',
        lambda cls, a, /, **more: None,
    ),
    'cached': ('megatron.core.kinds:Kinds.cached', None, None, lambda a: None),
    'conditional': (
        'megatron.core.package:chosen',
        'megatron/core/package/__init__.py',
        b'#!/usr/bin/env python\n# coding: latin-1\n# \xe9\ntry:\n    import no_such_module\n'
        b'except ImportError:\n    def chosen(*, key):\n        return key\n',
        lambda *, key: None,
    ),
    'imported': (
        'megatron.core.user:helper',
        'megatron/core/user.py',
        b'from .package.helpers import aid as helper\n',
        lambda x: None,
    ),
    'helpers': (
        'megatron.core.package.helpers:aid',
        'megatron/core/package/helpers.py',
        b'@print\ndef first(): pass\n@str\n@print\ndef aid(x): return x\n',
        lambda x: None,
    ),
}
IDS = [id for id in FILES if id != 'helpers']


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of release 0.19 whose seams are ``IDS``."""
    rows = [
        {
            'id': id,
            'target': FILES[id][0],
            'needed_by': '--residual-type',
            'reason': f'reason of {id}',
            'fingerprints': {'0.19': engine.fingerprint(FILES[id][3])},
        }
        for id in IDS
    ]
    seams = tmp_path / 'seams.json'
    seams.write_text(json.dumps(rows))
    monkeypatch.setattr(tree_scan, 'SEAMS', seams)
    root = tmp_path / 'tree with a space'
    for _, name, source, _ in FILES.values():
        if name:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
    (root / 'megatron/core/package_info.py').write_text(INFO.format(minor=19))
    yield root
    for id in IDS:
        PLACED.pop(id, None)


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file() and '.git' not in path.parts
    }


@pytest.fixture
def patch(tree, capfdbinary):
    """``patch(*flags)`` -> (exit code, stdout, stderr) of the command on the tree."""

    def run(*flags: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(['patch', str(tree), *flags])
        # Sources may hold any bytes, and so does a diff of them.
        return stop.value.code, *(text.decode('latin-1') for text in capfdbinary.readouterr())

    return run


@pytest.fixture
def repository(tree):
    """``git(*command)`` in the tree, all of which is committed."""

    def git(*command: str) -> str:
        return subprocess.run(
            [*GIT, *command], cwd=tree, check=True, capture_output=True, text=True
        ).stdout

    for command in ('init -q', 'add -A', 'commit -qm all'):
        git(*command.split())
    return git


def execute(tree: pathlib.Path, name: str) -> dict:
    names = {'__name__': 'sample', '__builtins__': __builtins__}
    exec(compile((tree / name).read_bytes(), name, 'exec'), names)
    return names


def test_check_is_the_default_and_changes_nothing(tree, patch):
    before = contents(tree)
    code, out, _ = patch()
    assert code == 0 and f'{len(IDS)} ready' in out
    for id, place in (
        ('plain', 'megatron/core/plain.py:7'),
        ('windows', 'megatron/core/windows.py:3'),
        ('imported', 'megatron/core/package/helpers.py:5'),
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
    assert 'already applied' in patch('--apply')[2] and contents(tree) == after
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


def test_diff_is_what_git_applies(tree, patch, repository):
    before = contents(tree)
    code, out, _ = patch('--diff')
    assert code == 0 and contents(tree) == before
    head = out.partition('diff --git')[0]
    assert all(f'reason of {id}' in head for id in IDS) and '--reverse' in head
    subprocess.run(['git', 'apply'], cwd=tree, input=out.encode('latin-1'), check=True)
    by_git = contents(tree)
    repository('checkout', '-q', '.')
    patch('--apply')
    assert contents(tree) == by_git != before


def test_git_sees_a_plain_change_and_nothing_else(tree, patch, repository):
    state = repository('rev-parse', 'HEAD'), (tree / '.git/index').read_bytes()
    code, out, _ = patch('--apply')
    assert code == 0 and 'no git' not in out
    assert (repository('rev-parse', 'HEAD'), (tree / '.git/index').read_bytes()) == state
    assert len(repository('status', '--short').splitlines()) == 5
    patch('--reverse')
    assert repository('status', '--short') == repository('diff') == ''


def test_uncommitted_changes_are_refused_and_ours_are_not_counted(tree, patch, repository):
    patch('--apply')
    plain = tree / 'megatron/core/plain.py'
    # One seam taken out by hand: the file differs from the commit by our own line only.
    plain.write_text(plain.read_text().replace(seam_line('plain') + '\n', ''))
    assert patch('--apply')[0] == 0 and f'{len(IDS)} applied' in patch()[1]
    patch('--reverse')
    (tree / 'megatron/core/package_info.py').write_text(INFO.format(minor=19) + '# mine\n')
    assert patch('--apply')[0] == 0, 'a changed file that is not to be touched does not matter'
    patch('--reverse')
    plain.write_text(plain.read_text() + '# mine\n')
    dirty = contents(tree)
    code, _, error = patch('--apply')
    assert code == 2 and error.count('\n') == 1
    assert 'megatron/core/plain.py' in error and '--allow-dirty' in error
    assert contents(tree) == dirty
    assert patch('--apply', '--allow-dirty')[0] == 0
    # What the user wrote since stays.
    plain.write_text('# top\n' + plain.read_text().replace('return a,', 'return  a,'))
    patch('--reverse')
    kept = '# top\n' + FILES['plain'][2].decode().replace('return a,', 'return  a,') + '# mine\n'
    assert plain.read_text() == kept


def test_files_that_git_never_saw_are_refused(tree, patch, repository):
    repository('rm', '-q', '--cached', 'megatron/core/plain.py')
    repository('commit', '-qm', 'less')
    code, _, error = patch('--apply')
    assert code == 2 and 'megatron/core/plain.py' in error and 'windows' not in error


def test_a_tree_that_git_ignores_is_one_without_git(tree, patch):
    subprocess.run([*GIT, 'init', '-q'], cwd=tree.parent, check=True)
    (tree.parent / '.gitignore').write_text('tree*\n')
    code, out, _ = patch('--apply')
    assert code == 0 and 'no git here' in out


@pytest.mark.parametrize(
    'edit', [('("plain")', '("plain", 1)'), ('  # megatron-mhc', ''), ('@mhc_seam', '# @mhc_seam')]
)
def test_edited_lines_are_refused_with_their_place(tree, patch, edit):
    patch('--apply')
    plain = tree / 'megatron/core/plain.py'
    line = seam_line('plain')
    plain.write_text(plain.read_text().replace(line, line.replace(*edit)))
    before = contents(tree)
    for flag in ('--reverse', '--apply'):
        code, _, error = patch(flag)
        assert code == 2 and error.count('\n') == 1, flag
        assert 'megatron/core/plain.py:8: a line of megatron-mhc was edited' in error
    assert patch()[0] == 1 and contents(tree) == before


def test_an_import_line_that_is_gone_is_told(tree, patch):
    patch('--apply')
    windows = tree / 'megatron/core/windows.py'
    kept = [line for line in windows.read_bytes().splitlines(True) if b'import mhc' not in line]
    windows.write_bytes(b''.join(kept))
    code, out, _ = patch()
    assert code == 1 and 'the import of mhc_seam is gone; --reverse, then --apply' in out
    patch('--reverse')
    assert windows.read_bytes() == FILES['windows'][2]


def test_a_changed_signature_is_named_and_taken_when_told(tree, patch):
    plain = tree / 'megatron/core/plain.py'
    plain.write_text(plain.read_text().replace('b=1)', 'b=1, extra=None)'))
    before = contents(tree)
    code, out, _ = patch()
    assert code == 1 and '1 differs' in out
    known = engine.fingerprint(FILES['plain'][3])
    seen = engine.fingerprint(lambda a, *rest, b=1, extra=None: None)
    message = f'signature {seen} work(a, *rest, b, extra), expected {known}'
    assert message in out
    code, _, error = patch('--apply')
    assert code == 2 and message in error and 'megatron/core/plain.py:7' in error
    assert error.count('\n') == 1 and contents(tree) == before
    assert patch('--apply', '--untested')[0] == 0
    assert seam_line('plain', seen) in plain.read_text() and patch()[0] == 0
    # The seam says what was vouched for, and the engine takes that and nothing else.
    execute(tree, 'megatron/core/plain.py')
    sample = engine.Patch('plain', 'x:y', lambda f: f, 'test', {'0.19': known})
    assert engine.inspect_patch(sample)[0] == 'ready'
    PLACED['plain'].accepted = '00000000'
    assert engine.inspect_patch(sample)[0] == 'unknown'
    # Another change under the seam.
    plain.write_text(plain.read_text().replace('extra=None', 'other=None'))
    code, _, error = patch('--apply', '--untested')
    assert code == 2 and '--reverse, then --apply again' in error
    plain.write_text(plain.read_text().replace('other=None', 'extra=None'))
    patch('--reverse')
    assert contents(tree) == before


def test_a_moved_definition_is_found_and_may_be_marked_by_hand(tree, patch):
    plain, moved = tree / 'megatron/core/plain.py', tree / 'megatron/moved.py'
    moved.write_bytes(b'import os\n' + FILES['plain'][2].partition(b'import os\n')[2])
    plain.write_text('import os\n')
    code, out, _ = patch()
    assert code == 1 and 'megatron.core.plain:work is not there' in out
    assert 'work is defined at megatron/moved.py:5; put `@mhc_seam("plain")' in out
    assert patch('--apply')[0] == 2
    code, _, error = patch('--apply', '--untested')
    assert code == 0 and 'left out: plain' in error and patch()[0] == 1
    patch('--reverse')
    text = moved.read_text().replace('def work', f'{seam_line("plain")}\ndef work')
    moved.write_text(tree_scan.IMPORT.decode() + '\n' + text)
    assert patch('--apply')[0] == 0
    code, out, _ = patch()
    assert code == 0 and f'{len(IDS)} applied' in out and 'megatron/moved.py:7' in out
    patch('--reverse')
    assert b'mhc' not in moved.read_bytes()


def test_two_definitions_of_a_name_are_left_to_the_user(tree, patch):
    plain = tree / 'megatron/core/plain.py'
    plain.write_text(plain.read_text() + 'if os:\n    def work(a, *rest, b=1): ...\n')
    code, _, error = patch('--apply')
    assert code == 2 and 'defined 2 times, megatron/core/plain.py:7, ' in error


@pytest.mark.parametrize('minor', [16, 20])
def test_an_untested_release_needs_a_word(tree, patch, minor, monkeypatch):
    (tree / 'megatron/core/package_info.py').write_text(INFO.format(minor=minor))
    if minor == 16:
        rows = json.loads(tree_scan.SEAMS.read_text())
        for row in rows:
            row['fingerprints'] = {'0.17': row['fingerprints']['0.19']}
        tree_scan.SEAMS.write_text(json.dumps(rows))
    before = contents(tree)
    code, out, _ = patch()
    assert code == 1 and f'{len(IDS)} ready' in out and 'tested are 0.17, 0.18, 0.19' in out
    code, _, error = patch('--apply')
    assert code == 2 and f'megatron-core 0.{minor}.1' in error and '--untested' in error
    assert contents(tree) == before and patch('--apply', '--untested')[0] == 0
    accept = engine.fingerprint(FILES['plain'][3])
    assert seam_line('plain', accept) in (tree / 'megatron/core/plain.py').read_text()
    assert f'{len(IDS)} applied' in patch()[1]
    # At run time too: the word holds for the signature, and for nothing that has no seam.
    execute(tree, 'megatron/core/plain.py')
    monkeypatch.setattr(engine, 'core_version', lambda: f'0.{minor}.1')
    known = dict.fromkeys(('0.17', '0.18', '0.19'), accept)
    sample = engine.Patch('plain', 'x:y', lambda f: f, 'test', known)
    assert engine.inspect_patch(sample)[0] == 'ready'
    PLACED['plain'].accepted = None
    assert engine.inspect_patch(sample)[0] == 'unknown'
    patch('--reverse')
    assert contents(tree) == before


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


@pytest.mark.parametrize(
    'source',
    [
        b'class Box: open = 1; open = 2\nif 1: x = 1\nelse: y = 2\nz = [\n',
        b'import os; value = (\n1)\nclass Box:\n    def open(self, x): return x\n',
        b'class Box:\n    if 1: pass\n    else: pass\n    x = 1; open = x\n',
        b'\xef\xbb\xbfclass Box:\n    def open(self, x): return x\n',
    ],
    ids=['broken', 'shared-line', 'no-def', 'bom'],
)
def test_files_that_cannot_be_edited_are_refused_whole(tree, patch, source):
    (tree / 'megatron/core/windows.py').write_bytes(source)
    before = contents(tree)
    code, _, error = patch('--apply')
    assert code == 2 and error.count('\n') == 1 and 'megatron/core/windows.py' in error
    assert contents(tree) == before


@pytest.mark.parametrize(
    ('prepare', 'message'),
    [
        (lambda info: info.unlink(), 'no megatron/core/package_info.py; name the folder'),
        (lambda info: info.write_text('x = 1\n'), 'no MAJOR, MINOR and PATCH'),
    ],
)
def test_a_folder_that_is_no_tree_is_refused(tree, patch, prepare, message):
    prepare(tree / 'megatron/core/package_info.py')
    code, _, error = patch()
    assert code == 2 and message in error and error.count('\n') == 1


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


def test_fingerprints_read_are_fingerprints_seen(random_seed):
    import ast
    import random

    from megatron_mhc.tree_edit import fingerprint

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
