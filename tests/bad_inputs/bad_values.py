"""Values that no flag of a kind takes."""

from __future__ import annotations

# Not integers at all, or beyond every size; the last has more digits than Python converts.
NO_INTEGER = ('x', '', '1.5', 'nan', 'inf', '1e3', '²', 'True')
ABSURD = ('99999999999999999999', '9' * 5000)
COUNT = ('0', '-1', '-99999999999999999999', *NO_INTEGER, *ABSURD)
FROM_ZERO = ('-1', *NO_INTEGER, *ABSURD)
# Finite numbers, from 0 on.
NO_NUMBER = ('x', '', '1,5', 'nan', 'inf', '-inf', '1e400', 'None')
FACTOR = ('-1', '-0.001', *NO_NUMBER, '1e+300')
CHOICE = ('x', '', 'MHC', '4', 'none,auto')
