"""Every bad line of a script in tools/ or examples/ is refused in one line."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest
from bad_files import TOOL_TAKES_A_FILE, write_files
from bad_files import rows as file_rows
from bad_tools import ROWS as LINES
from one_line import check, label

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / name for name in ('tools', 'tools/bench', 'examples')]
ROWS = LINES + file_rows(TOOL_TAKES_A_FILE)


@pytest.fixture(scope='module')
def script():
    """``script(line)``: the main of the script that a line begins with, once imported."""
    loaded = {}
    before, sys.path[:] = sys.path[:], [*map(str, FOLDERS), *sys.path]

    def run(line: list[str]) -> object:
        name, *arguments = line
        if name not in loaded:
            (path,) = (folder / name for folder in FOLDERS if (folder / name).exists())
            spec = importlib.util.spec_from_file_location(f'bad_{path.stem}', path)
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name].main(arguments)

    yield run
    sys.path[:] = before


@pytest.mark.parametrize('row', ROWS, ids=[f'{i}-{label(row)}' for i, row in enumerate(ROWS)])
def test_refused_in_one_line(script, row, monkeypatch, tmp_path):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    check(script, row)
