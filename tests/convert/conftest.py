"""Workers of conversions are forked, as ranks are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import launch

from megatron_mhc.convert import worker


@pytest.fixture(scope='package', autouse=True)
def forked_workers():
    """Yields the function that starts them for users."""

    def answer(module: str, *words: str) -> Any:
        done = launch(0, '-m', module, *words)
        if done.returncode:
            raise worker.NoAnswer((done.stderr.strip().splitlines() or ['no message'])[-1])
        return json.loads(done.stdout.splitlines()[-1])

    own = worker.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, 'answer', answer)
        yield own
