"""Every file or folder that cannot be what a command wants is refused in one line."""

from __future__ import annotations

import json

import pytest
from bad_files import KERNEL, rows, write_files
from one_line import check, label, said

from megatron_mhc.cli import main

ROWS = rows()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp('files')
    write_files(made)
    return made


@pytest.mark.parametrize('row', ROWS, ids=[f'{i}-{label(row)}' for i, row in enumerate(ROWS)])
def test_refused_in_one_line(row, folder, monkeypatch):
    monkeypatch.chdir(folder)
    check(main, row)


@pytest.mark.parametrize(
    'changed',
    [{key: value} for key in ('pid', 'tid', 'dur', 'args') for value in ([], {}, 'x', None, 1e999)],
)
def test_events_that_torch_would_not_write(changed, tmp_path, monkeypatch):
    """Whatever stands in a field, there is a report or one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 't.json').write_text(json.dumps({'traceEvents': [KERNEL | changed]}))
    try:
        check(main, said('schedule trace t.json', 't.json'))
    except AssertionError as error:
        assert str(error).startswith('status 0')


def test_a_file_that_must_not_be_read(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr('os.access', lambda *_: False)
    check(main, said('schedule trace cut.json', 'FILE', 'cut.json'))
