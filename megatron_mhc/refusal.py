"""What the first rank says for all: notices, and the one line that ends a run on wrong input."""

from __future__ import annotations

import functools
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


@functools.cache
def announce(line: str) -> None:
    """Print a notice on the first rank, once: Megatron parses the command line more than once."""
    if is_first_rank():
        print(f'[megatron-mhc] {line}', flush=True)
