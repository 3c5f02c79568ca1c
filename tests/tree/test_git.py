"""What git sees of a patched tree, and what it is asked before."""

from __future__ import annotations

import subprocess

from sample_tree import FILES, GIT, IDS, INFO, contents

from megatron_mhc.tree.edit import seam_line


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


def test_a_tree_may_be_a_folder_of_a_repository(tree, patch):
    for command in ('init -q', 'add -A', 'commit -qm all'):
        subprocess.run([*GIT, *command.split()], cwd=tree.parent, check=True)
    code, out, _ = patch('--apply')
    assert code == 0 and 'no git' not in out
    patch('--reverse')
    plain = tree / 'megatron/core/plain.py'
    # A note of the user's own is no line of ours.
    plain.write_text(plain.read_text() + '# megatron-mhc: a note\n')
    code, _, error = patch('--apply')
    assert code == 2 and '1 files' in error and 'megatron/core/plain.py' in error
    assert 'nothing to take out' in patch('--reverse')[1]


def test_a_tree_that_git_ignores_is_one_without_git(tree, patch):
    subprocess.run([*GIT, 'init', '-q'], cwd=tree.parent, check=True)
    (tree.parent / '.gitignore').write_text('tree*\n')
    code, out, _ = patch('--apply')
    assert code == 0 and 'no git here' in out
