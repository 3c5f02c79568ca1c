"""Every bad argument of the Python API is a ValueError or TypeError of one line that names it."""

from __future__ import annotations

import pytest
from bad_api import cases, run
from one_line import check_message, in_time

CASES = cases()


@pytest.mark.parametrize('case', CASES, ids=[f'{i}-{case[2]}' for i, case in enumerate(CASES)])
def test_refused_in_one_line(case):
    target, arguments, name = case
    with in_time(), pytest.raises((ValueError, TypeError)) as raised:
        run(target, arguments)
    # What Python says by itself of a wrong type has no remedy.
    check_message(str(raised.value), (name,))
