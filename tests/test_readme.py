"""What the README and the guides state is what the code reads, and their links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import re
import shlex
import sys
import types

import pytest

from megatron_mhc import __version__, cli
from megatron_mhc.commands.doctor import report
from megatron_mhc.compat import (
    CORE_BELOW,
    CORE_MIN,
    CORE_SPECIFIER,
    PYTHON_MIN,
    PYTHON_TESTED,
    RANGES,
    TESTED,
    TORCH_TESTED,
    TRITON_TESTED,
    untested,
)
from megatron_mhc.settings.groups import EVERY_GROUP

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
DOCS = ROOT / 'megatron_mhc' / 'docs'
FLAGS = (DOCS / 'flags.md').read_text()
SUPPORT = (DOCS / 'support.md').read_text()


def test_compatibility_table():
    rows = dict(re.findall(r'^\| (0\.\d+\.\d+) \| (\w+) \|$', SUPPORT, re.MULTILINE))
    assert rows == TESTED
    for page in (README, SUPPORT):
        assert f'Megatron-Core `{CORE_SPECIFIER}`' in page
        assert f'Python >= {PYTHON_MIN[0]}.{PYTHON_MIN[1]}' in page
    low, high = ('.'.join(map(str, bound)) for bound in (CORE_MIN, CORE_BELOW))
    assert f'>={low},<{high}' == CORE_SPECIFIER
    versions = {'Python': PYTHON_TESTED, 'torch': TORCH_TESTED, 'Triton': TRITON_TESTED}
    tested = '; '.join(f'{name} {", ".join(seen)}' for name, seen in versions.items())
    assert f'tested: {tested}.' in ' '.join(SUPPORT.split())


def test_doctor_names_what_nobody_has_tested(monkeypatch):
    assert untested() == [] and report()['untested'] is None
    installed = {'torch': '2.16.0+cu131', 'triton': '3.5.9'}
    monkeypatch.setattr('importlib.metadata.version', lambda name: installed.get(name, '1'))
    monkeypatch.setitem(RANGES, 'Python', ('3.6', '3.7'))
    assert untested() == [
        f'Python {sys.version_info[0]}.{sys.version_info[1]} (tested: 3.6 - 3.7)',
        'torch 2.16.0+cu131 (tested: 2.11 - 2.15)',
        'triton 3.5.9 (tested: 3.6 - 3.9)',
    ]
    assert report()['untested'] == '; '.join(untested())


def documented(page):
    return set(re.findall(r'^\| `(--[a-z-]+)`', page, re.MULTILINE))


def test_flag_table():
    parser = argparse.ArgumentParser(add_help=False)
    for add_group in EVERY_GROUP:
        add_group(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert documented(FLAGS) == {action.option_strings[0] for action in parser._actions}
    # Wherever else a page names a flag of ours, it is spelt as the parser has it.
    ours = re.compile(
        r'(?<![\w-])--(?:residual|mhc|hc|mudd|gated|attention-residual|engram|lr-step)(?:-[a-z]+)+'
    )
    for page in (ROOT / 'README.md', *DOCS.glob('*.md')):
        assert set(ours.findall(page.read_text())) <= flags, page
    assert '--residual-type' in ours.findall(README)


def test_version_is_written_alike():
    assert f'\nversion: {__version__}\n' in (ROOT / 'CITATION.cff').read_text()
    newest = re.search(r'^## .*?(\d+\.\d+\.\d+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert newest[1] == __version__


def test_length():
    assert README.count('\n') <= 120


ROOMS = ('megatron_mhc', 'patches', 'schedules', 'kernels', 'examples', 'tests', 'tools')
# What `make bench` writes.
MADE = ('results.md',)
PAGES = [*ROOT.glob('*.md'), *(page for room in ROOMS for page in (ROOT / room).rglob('*.md'))]


def test_every_file_that_a_page_names_exists():
    """Markdown by its name alone may lie beside the page; others are named from the root."""
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r'`([\w./-]+\.md)`', text)
        rooted = re.findall(rf'(?<![\w/])((?:{"|".join(ROOMS)})/[\w./-]*\w\.\w+)', text)
        for name in {*named, *rooted} - {*MADE}:
            assert (ROOT / name).exists() or (page.parent / name).exists(), (page, name)


def test_every_link_leads_somewhere():
    """Links are relative to their page, so that any reader of Markdown follows them."""
    found = 0
    for page in PAGES:
        for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
            name, _, heading = target.partition('#')
            if re.match(r'[a-z]+:', name):
                continue
            path = page.parent / name if name else page
            assert path.exists(), (page, target)
            headings = re.findall(r'^#+ (.+)$', path.read_text(), re.MULTILINE) if heading else ()
            slugs = {re.sub(r'[^\w -]', '', words).lower().replace(' ', '-') for words in headings}
            assert not heading or heading in slugs, (page, target)
            found += 1
    assert found > 40


def commands():
    """Lines of `megatron-mhc` in code blocks, without what stands for other words, or a file."""
    for page in PAGES:
        for block in re.findall(r'^```\w*\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.findall(r'^megatron-mhc (.+)', block.replace('\\\n', ' '), re.MULTILINE):
                yield re.sub(r'\[|\]|\.\.\.', ' ', line.partition(' > ')[0])


@pytest.mark.parametrize('line', sorted({*commands()}))
def test_every_command_of_a_page_is_one(line, monkeypatch):
    """It is parsed; what would answer is not called."""

    def module(name, load=importlib.import_module):
        add_arguments = getattr(load(name), 'add_arguments', None)
        return types.SimpleNamespace(add_arguments=add_arguments, main=lambda options: 0)

    monkeypatch.setattr(cli, 'importlib', types.SimpleNamespace(import_module=module))
    monkeypatch.setattr(cli, 'enter_tree_at_hand', lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(line, comments=True))
    assert ended.value.code == 0
