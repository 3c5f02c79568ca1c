"""The tables stand beside the tests; pytest imports tests by path."""

import importlib.util
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDERS = [ROOT / name for name in ('tools', 'tools/bench', 'examples')]
sys.path.append(str(HERE))


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
