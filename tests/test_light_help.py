"""Help is printed without torch: no command imports what only its work needs."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mhc.cli import COMMANDS
from megatron_mhc.convert.choices import TARGETS
from megatron_mhc.recipes.names import LAYOUT_NAMES, MODELS
from megatron_mhc.schedules.names import SCHEDULE_NAMES
from megatron_mhc.study.names import HARDWARE

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {'torch', 'numpy', 'matplotlib', 'megatron', 'triton', 'safetensors'}
# Each takes longer to import than the parser of a command to build. A dataclass needs ``inspect``.
SLOW = {
    *('dataclasses', 'email', 'hashlib', 'importlib.metadata', 'inspect', 'pydoc', 'socket'),
    *('sqlite3', 'subprocess', 'typing', 'zipfile'),
}
PROBE = """
import json, runpy, sys
module, *arguments = sys.argv[1:]
sys.argv = [module, *arguments]
status = 'no exit'
try:
    runpy.run_module(module, run_name='__main__', alter_sys=True)
except SystemExit as end:
    status = end.code
print(json.dumps({'status': status, 'loaded': sorted(sys.modules)}), file=sys.stderr)
"""


def pages() -> list[tuple[str, ...]]:
    """Every command with its topics, asked of the parsers themselves."""
    found = [()]
    for name, (module, _) in COMMANDS.items():
        found.append((name,))
        parser = argparse.ArgumentParser()
        # The launcher's parser has no topics.
        if name != 'run':
            importlib.import_module(f'megatron_mhc.{module}').add_arguments(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [(name, topic) for topic in action.choices]
    return found


PAGES = pages()


def loaded(folder: Path, module: str, *arguments: str) -> tuple[str, set[str]]:
    """What ``python -m module arguments`` prints, and the modules that it imports."""
    result = subprocess.run(
        [sys.executable, '-c', PROBE, module, *arguments],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    seen = json.loads(result.stderr.splitlines()[-1])
    assert seen['status'] == 0, result.stderr
    return result.stdout, set(seen['loaded'])


def test_all_pages_are_known():
    assert {('schedule', 'show'), ('recipe', 'list'), ('kernels', 'accuracy')} <= set(PAGES)


@pytest.mark.parametrize('page', PAGES, ids=' '.join)
def test_help_needs_no_torch(page, tmp_path):
    text, modules = loaded(tmp_path, 'megatron_mhc', *page, '--help')
    assert text.startswith(f'usage: megatron-mhc {" ".join(page)}'.strip())
    assert not modules & (HEAVY | SLOW)


def test_the_launchers_own_help_needs_none_either(tmp_path):
    text, modules = loaded(tmp_path, 'megatron_mhc.run', '--help')
    assert '--residual-type' in text and not modules & (HEAVY | SLOW)


def test_torch_is_noticed(tmp_path):
    (tmp_path / 'heavy.py').write_text('import torch\nraise SystemExit(0)\n')
    assert 'torch' in loaded(tmp_path, 'heavy')[1]


def test_words_of_options_are_those_of_what_they_name():
    from megatron_mhc.convert.layouts import LAYOUTS as CHECKPOINTS
    from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES
    from megatron_mhc.schedules.catalog import SCHEDULES
    from megatron_mhc.study.presets import PRESETS

    assert tuple(CHECKPOINTS) == TARGETS
    assert tuple(RECIPES) == MODELS
    assert all(tuple(layouts) == LAYOUT_NAMES for layouts in LAYOUTS.values())
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    assert tuple(PRESETS) == HARDWARE


def test_default_times_are_those_of_the_simulator():
    from megatron_mhc.commands.schedule import TIMES
    from megatron_mhc.schedules.times import Times

    defaults = {name: default for name, (default, _) in TIMES.items()}
    assert defaults == {name: getattr(Times, name.replace('-', '_')) for name in TIMES}
    assert Times.fused_slot_factor == 1
