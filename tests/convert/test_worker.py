"""A worker of a conversion is a process that finds what this one finds."""

from __future__ import annotations

import pytest

from megatron_mhc.convert import worker


@pytest.fixture(autouse=True)
def as_for_users(real_run, monkeypatch):
    monkeypatch.setattr(worker, 'run', real_run)


def test_its_last_line_is_the_answer(tmp_path, monkeypatch):
    (tmp_path / 'beside.py').write_text('VALUE = "found"')
    (tmp_path / 'work.py').write_text(
        'import beside, json, sys\n'
        'print("progress")\n'
        'print(json.dumps([beside.VALUE, *sys.argv[1:]]))'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert worker.answer('work', 'a b') == ['found', 'a b']


def test_its_last_word_is_the_reason(tmp_path, monkeypatch):
    (tmp_path / 'fails.py').write_text('raise KeyError("layer 7")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(worker.NoAnswer, match=r"^KeyError: 'layer 7'$"):
        worker.answer('fails')
