"""What the first rank says for all: notices, and the one line that ends a run on wrong input."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# Seconds that ranks of one job may be apart when they parse the command line.
PATIENCE = 15.0


def is_first_rank() -> bool:
    """Whether this process speaks for all; true outside a distributed launch."""
    return os.environ.get('RANK', '0') == '0'


def is_first_of_node() -> bool:
    """Whether this process reads for its node what all ranks would read alike."""
    return os.environ.get('LOCAL_RANK', '0') == '0'


def refuse(program: str, message: str) -> NoReturn:
    """End the process as argparse does, without its usage text.

    The first rank says why. The others wait for it, since torchrun ends every rank as soon as one
    has gone; what only they refuse is said once a node. torchrun prints a report of its own after
    all that its ranks said; it gets the line too, and repeats it at the end.
    """
    message = ' '.join(message.split())
    if is_first_rank():
        line = f'{program}: error: {message}'
        print(line, file=sys.stderr, flush=True)
        _tell_torchrun(line)
    else:
        time.sleep(PATIENCE)
        if is_first_of_node():
            rank = os.environ['RANK']
            print(f'{program}: error on rank {rank}: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


def with_remedy(program: str, message: str) -> str:
    """A message of argparse, which says what is wrong; ours say what to do as well."""
    return message if '; ' in message else f'{message}; {program} --help lists what there is'


class OneLineParser(argparse.ArgumentParser):
    """Answers wrong input without the usage text."""

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, with_remedy(self.prog, message))


def _tell_torchrun(line: str) -> None:
    """Leave the line where torchrun looks for the reason of a failure."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if path is not None:
        import contextlib
        import json

        with contextlib.suppress(OSError), open(path, 'w') as file:
            said = {'py_callstack': line, 'timestamp': str(int(time.time()))}
            json.dump({'message': {'message': line, 'extraInfo': said}}, file)


@functools.cache
def announce(line: str) -> None:
    """Print a notice on the first rank, once: Megatron parses the command line more than once."""
    if is_first_rank():
        print(f'[megatron-mhc] {line}', flush=True)
