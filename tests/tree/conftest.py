"""A small tree, ``megatron-mhc patch`` on it, and git in it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from megatron_mhc.cli import main
from megatron_mhc.patches import engine
from megatron_mhc.patches.placed import PLACED
from megatron_mhc.tree import scan as tree_scan

# pytest imports tests by path.
sys.path.append(str(pathlib.Path(__file__).parent))

from sample_tree import FILES, GIT, IDS, INFO, READS  # noqa: E402


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of release 0.19 whose seams are ``IDS``."""
    rows = [
        {
            'id': id,
            'target': FILES[id][0],
            'needed_by': '--residual-type',
            'reason': f'reason of {id}',
            'reads': READS.get(id, []),
            'fingerprints': dict.fromkeys(('0.19', '0.20'), engine.fingerprint(FILES[id][3])),
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
