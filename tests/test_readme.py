"""What the README states as a table is what the code reads."""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

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
from megatron_mhc.patches.flag_groups import GROUPS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
FLAGS = (ROOT / 'megatron_mhc' / 'README.md').read_text()


def test_compatibility_table():
    rows = dict(re.findall(r'^\| (0\.\d+\.\d+) \| (\w+) \|$', README, re.MULTILINE))
    assert rows == TESTED
    assert f'Megatron-Core `{CORE_SPECIFIER}`' in README
    assert f'Python >= {PYTHON_MIN[0]}.{PYTHON_MIN[1]}' in README
    low, high = ('.'.join(map(str, bound)) for bound in (CORE_MIN, CORE_BELOW))
    assert f'>={low},<{high}' == CORE_SPECIFIER
    versions = {'Python': PYTHON_TESTED, 'torch': TORCH_TESTED, 'Triton': TRITON_TESTED}
    tested = '; '.join(f'{name} {", ".join(seen)}' for name, seen in versions.items())
    assert f'tested: {tested}.' in ' '.join(README.split())


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
    for add_group in GROUPS:
        add_group(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert documented(FLAGS) == flags
    assert documented(README) < flags


def test_length():
    assert README.count('\n') <= 220


ROOMS = ('megatron_mhc', 'patches', 'schedules', 'kernels', 'examples', 'tests', 'tools')
# What `make bench` writes.
MADE = ('results.md',)
PAGES = [ROOT / 'README.md', *(page for room in ROOMS for page in (ROOT / room).rglob('*.md'))]


def test_every_file_that_a_page_names_exists():
    """Markdown by its name alone may lie beside the page; others are named from the root."""
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r'`([\w./-]+\.md)`', text) + re.findall(r'\]\(([\w./-]+)\)', text)
        rooted = re.findall(rf'(?<![\w/])((?:{"|".join(ROOMS)})/[\w./-]*\w\.\w+)', text)
        for name in {*named, *rooted} - {*MADE}:
            assert (ROOT / name).exists() or (page.parent / name).exists(), (page, name)
