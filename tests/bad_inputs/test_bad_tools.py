"""Every bad line of a script in tools/ or examples/ is refused in one line."""

from __future__ import annotations

import pytest
from bad_files import TOOL_TAKES_A_FILE, write_files
from bad_files import rows as file_rows
from bad_tools import ROWS as LINES
from one_line import check, label

ROWS = LINES + file_rows(TOOL_TAKES_A_FILE)


@pytest.mark.parametrize('row', ROWS, ids=[f'{i}-{label(row)}' for i, row in enumerate(ROWS)])
def test_refused_in_one_line(script, row, monkeypatch, tmp_path):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    check(script, row)
