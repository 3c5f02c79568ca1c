"""How wrong input is answered: one line from the first rank, exit status 2, on every rank."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def is_first_rank() -> bool:
    """Whether this process speaks for all; true outside a distributed launch."""
    return os.environ.get('RANK', '0') == '0'


def refuse(program: str, message: str) -> NoReturn:
    """End the process as argparse does, without its usage text."""
    if is_first_rank():
        print(f'{program}: error: {message}', file=sys.stderr)
    sys.exit(2)
