"""Every bad line of a command is refused in one line that names flag, value and remedy."""

from __future__ import annotations

import pytest
from bad_commands import ROWS
from one_line import check, label

from megatron_mhc.cli import main


@pytest.mark.parametrize('row', ROWS, ids=[f'{i}-{label(row)}' for i, row in enumerate(ROWS)])
def test_refused_in_one_line(row, monkeypatch, tmp_path):
    # Some lines name files that must not be there; nothing may be written either.
    (tmp_path / 't.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    check(main, row)
    assert [path.name for path in tmp_path.iterdir()] == ['t.json']
