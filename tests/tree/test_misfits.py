"""What does not fit is named with its place and remedy, and nothing is changed."""

from __future__ import annotations

import json

import pytest
from sample_tree import FILES, IDS, INFO, contents, execute

from megatron_mhc.patches import engine
from megatron_mhc.patches.placed import PLACED, Seam
from megatron_mhc.tree import scan as tree_scan
from megatron_mhc.tree.edit import seam_line


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
    assert f'patch {tree} --apply --untested` takes it as it is' in error
    # Another change under the seam.
    plain.write_text(plain.read_text().replace('extra=None', 'other=None'))
    code, _, error = patch('--apply', '--untested')
    assert code == 2 and '--reverse, then --apply again' in error
    plain.write_text(plain.read_text().replace('other=None', 'extra=None'))
    patch('--reverse')
    assert contents(tree) == before


@pytest.mark.parametrize('more', ['', 'extra=None, '])
def test_a_renamed_parameter_that_a_patch_reads_is_refused(tree, patch, more):
    """It would pass as a signature that the user vouches for, and fail while a model trains."""
    plain = tree / 'megatron/core/plain.py'
    plain.write_text(plain.read_text().replace('b=1', f'{more}c=1').replace('rest, b', 'rest, c'))
    before = contents(tree)
    names = f'work(a, *rest, {"extra, " if more else ""}c)'
    message = f'the patch reads b, and it is {names}; give the parameter its name'
    code, out, _ = patch()
    assert code == 1 and '1 renamed' in out and message in out
    for flags in (['--apply'], ['--apply', '--untested'], ['--diff', '--untested']):
        code, _, error = patch(*flags)
        assert code == 2 and error.count('\n') == 1 and message in error, flags
        assert 'megatron/core/plain.py:7' in error and contents(tree) == before
    # A seam that an earlier version of the tool has put there says so when a run starts.
    work = execute(tree, 'megatron/core/plain.py')['work']
    PLACED['plain'] = Seam(work, work, engine.fingerprint(work))
    sample = engine.Patch(
        'plain', 'x:y', lambda f: f, 'test', engine.on_every_release('0'), reads=('rest', 'b')
    )
    state, detail = engine.inspect_patch(sample)
    assert state == 'unknown' and 'the patch reads b, and the parameters are a, rest' in detail


def test_a_patched_tree_that_became_another_release_is_told(tree, patch):
    patch('--apply')
    (tree / 'megatron/core/package_info.py').write_text(INFO.format(minor=20))
    code, out, _ = patch()
    assert code == 1 and 'another release than 0.20.1; --reverse, then --apply again' in out
    code, _, error = patch('--apply', '--untested')
    assert code == 2 and '--reverse, then --apply again' in error


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


@pytest.mark.parametrize('minor', [16, 20, 21])
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
    known = dict.fromkeys(('0.17', '0.18', '0.19', '0.20'), accept)
    if minor == 20:
        known['0.20'] = '00000000'
    sample = engine.Patch('plain', 'x:y', lambda f: f, 'test', known)
    assert engine.inspect_patch(sample)[0] == 'ready'
    PLACED['plain'].accepted = None
    assert engine.inspect_patch(sample)[0] == 'unknown'
    patch('--reverse')
    assert contents(tree) == before


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
        (lambda info: info.write_text('MAJOR = ('), 'not Python: '),
        (lambda info: info.write_bytes(b'\0'), 'not Python: '),
        (lambda info: info.write_text('MAJOR = MINOR = PATCH = 1e999'), 'no MAJOR, MINOR'),
        (lambda info: info.write_text('MAJOR = 1e999\nMINOR = PATCH = 0'), 'no MAJOR, MINOR'),
        (lambda info: info.unlink(), 'no megatron/core/package_info.py; name the folder'),
        (lambda info: info.write_text('x = 1\n'), 'no MAJOR, MINOR and PATCH'),
    ],
)
def test_a_folder_that_is_no_tree_is_refused(tree, patch, prepare, message):
    prepare(tree / 'megatron/core/package_info.py')
    code, _, error = patch()
    assert code == 2 and message in error and error.count('\n') == 1
