"""Layers of the released Transformer Engine around hyper-connections, without a GPU.

Its Python runs as it is, under Megatron's own wrappers, layer specs and fp8 contexts; what it has
compiled is stood in for by ``tests/te/cpu_extension.py``. One process runs all cases, because
Megatron looks for Transformer Engine when it is imported.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest
from te_wheel import unpacked

FOLDER = pathlib.Path(__file__).parents[1] / 'te'
WORKER = FOLDER / 'worker.py'
CASES = re.findall(r'^def case_(\w+)', WORKER.read_text(), re.MULTILINE)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    try:
        wheel = unpacked()
    except RuntimeError as error:
        pytest.skip(f'{error}; .ci/run, which fetches it first, skips nothing')
    path = tmp_path_factory.mktemp('te') / 'results.json'
    command = [sys.executable, '-W', 'ignore', WORKER, wheel, path]
    worker = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert worker.returncode == 0, worker.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize('case', CASES)
def test_transformer_engine(results, case):
    if results[f'case_{case}'] is not None:
        pytest.fail(results[f'case_{case}'], pytrace=False)
