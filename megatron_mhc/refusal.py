"""What the first rank says for all: notices, and the one line that ends a run on wrong input."""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import NoReturn

# Seconds that ranks of one job may be apart when they parse the command line.
PATIENCE = 15.0


def is_first_rank() -> bool:
    """Whether this process speaks for all; true outside a distributed launch."""
    return os.environ.get('RANK', '0') == '0'


def refuse(program: str, message: str) -> NoReturn:
    """End the process as argparse does, without its usage text.

    The first rank says why. The others wait for it, since torchrun ends every rank as soon as one
    has gone; what only they refuse is said once a node.
    """
    if is_first_rank():
        print(f'{program}: error: {message}', file=sys.stderr, flush=True)
    else:
        time.sleep(PATIENCE)
        if os.environ.get('LOCAL_RANK', '0') == '0':
            rank = os.environ['RANK']
            print(f'{program}: error on rank {rank}: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


@functools.cache
def announce(line: str) -> None:
    """Print a notice on the first rank, once: Megatron parses the command line more than once."""
    if is_first_rank():
        print(f'[megatron-mhc] {line}', flush=True)
