"""The seams fit a copy of the installed release, and switch there instead of being rebound."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from megatron_mhc.compat import core_version
from megatron_mhc.tree.plan import plan_additions, plan_removal
from megatron_mhc.tree.scan import Tree
from megatron_mhc.tree.write import replace_all

ROOT = pathlib.Path(__file__).parents[2]
# Parses twice in a patched tree, as its own script does: without our flags and with one.
PARSE = """
import argparse, inspect
from megatron_mhc.runtime import cpu_device
cpu_device.install()
from megatron.training import arguments
from megatron_mhc.patches.engine import applied
from megatron_mhc.patches.placed import PLACED

def parse(*flags):
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args(
        ['--num-layers', '2', '--hidden-size', '32', '--num-attention-heads', '4', *flags])

def switched():
    return {id for id, seam in PLACED.items() if seam.current is not seam.original}

assert parse().residual_type == 'standard'
assert applied() == ('arguments',) and switched() == {'arguments'}, (applied(), switched())
parse('--residual-type', 'mhc')
# Core 0.17 imports the function of this one by name, so that it passes through the other's seam.
through = {'param-groups-muon'} & set(applied())
if through:
    from megatron.core.optimizer import _get_param_groups, muon
    assert muon._get_param_groups is _get_param_groups
assert switched() == set(applied()) - through > {'gpt-model', 'p2p', 'param-groups'}, switched()
from megatron.core.models.gpt import GPTModel
assert GPTModel.__init__.__code__.co_filename.endswith('megatron_mhc/seam.py')
assert 'config' in inspect.signature(GPTModel.__init__).parameters
parse('--residual-type', 'bad')
"""


@pytest.fixture(scope='module')
def copied(tmp_path_factory):
    """The sources of the release under test, as a tree."""
    root = tmp_path_factory.mktemp('tree')
    core = pathlib.Path(importlib.util.find_spec('megatron.core').origin).parent
    shutil.copytree(
        core.parent, root / 'megatron', ignore=shutil.ignore_patterns('__pycache__', '*.so')
    )
    return root


def sources(root: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob('*.py')}


def test_every_seam_goes_in_works_and_comes_out(copied):
    before, tree = sources(copied), Tree(copied)
    assert tree.version == core_version() and tree.is_tested
    findings = tree.findings()
    assert {f.state for f in findings} == {'ready'}, [f for f in findings if f.state != 'ready']
    plan = plan_additions(tree, findings, untested=False)
    replace_all({path: new for path, (_, new) in plan.items()})
    assert {f.state for f in Tree(copied).findings()} == {'applied'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PARSE],
        env={**os.environ, 'PYTHONPATH': f'{copied}{os.pathsep}{ROOT}'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and 'AssertionError' not in done.stderr, done.stderr[-3000:]
    error = [line for line in done.stderr.splitlines() if 'error:' in line]
    assert len(error) == 1 and '--residual-type' in error[0]
    replace_all({path: new for path, (_, new) in plan_removal(Tree(copied)).items()})
    assert sources(copied) == before
