"""What the README states as a table is what the code reads."""

from __future__ import annotations

import argparse
import pathlib
import re

from megatron_mhc.arguments import add_residual_arguments
from megatron_mhc.compat import CORE_BELOW, CORE_MIN, CORE_SPECIFIER, PYTHON_MIN, TESTED
from megatron_mhc.pipeline_arguments import add_pipeline_arguments

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()


def test_compatibility_table():
    rows = dict(re.findall(r'^\| (0\.\d+\.\d+) \| (\w+) \|$', README, re.MULTILINE))
    assert rows == TESTED
    assert f'Megatron-Core `{CORE_SPECIFIER}`' in README
    assert f'Python >= {PYTHON_MIN[0]}.{PYTHON_MIN[1]}' in README
    low, high = ('.'.join(map(str, bound)) for bound in (CORE_MIN, CORE_BELOW))
    assert f'>={low},<{high}' == CORE_SPECIFIER


def test_flag_table():
    parser = add_residual_arguments(argparse.ArgumentParser(add_help=False))
    parser = add_pipeline_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    documented = set(re.findall(r'^\| `(--[a-z-]+)`', README, re.MULTILINE))
    assert documented == flags


def test_length():
    assert README.count('\n') <= 220
