"""Workers of conversions are forked, as ranks are."""

from __future__ import annotations

import pathlib
import sys

import pytest
from launch import launch

from megatron_mhc.convert import worker

# pytest imports tests by path.
sys.path.append(str(pathlib.Path(__file__).parent))


@pytest.fixture(scope='package', autouse=True)
def real_run():
    """What starts them for users."""
    own = worker.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, 'run', lambda module, *words: launch(0, '-m', module, *words))
        yield own


@pytest.fixture(scope='module')
def megatron(tmp_path_factory):
    import hf_models

    with hf_models.megatron(tmp_path_factory.mktemp('modules')):
        yield
