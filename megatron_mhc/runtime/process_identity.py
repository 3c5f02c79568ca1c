"""Which process it was, so that another one can tell whether it still runs.

A number alone is not enough: it is given again after a while, and another container counts by
itself. On Linux a process is known by the boot of its kernel, its PID namespace, its number and the
tick at which it started.
"""

from __future__ import annotations

import os
import pathlib
import socket
from dataclasses import dataclass

PROC = pathlib.Path('/proc')


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of this or another machine.

    Args:
        host: its host's name, for people.
        machine: what counts processes there: a boot and a PID namespace.
        pid: its number.
        started: clock tick since the boot; empty where that is not known.
    """

    host: str
    machine: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host}'


def this_process() -> ProcessIdentity:
    """The identity of the caller."""
    pid = os.getpid()
    return ProcessIdentity(socket.gethostname(), _machine(), pid, _state(pid)[1])


def is_gone(process: ProcessIdentity) -> bool | None:
    """Whether ``process`` has ended; None where that cannot be seen from here."""
    if process.machine != _machine():
        return None
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # It is another user's, and may be hidden in /proc.
        pass
    state, started = _state(process.pid)
    # Killed and not yet waited for by its parent, or another process by now.
    return state in ('Z', 'X') or bool(started and process.started != started)


def _machine() -> str:
    try:
        boot = (PROC / 'sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {os.readlink(PROC / "self/ns/pid")}'
    except OSError:
        return socket.gethostname()


def _state(pid: int) -> tuple[str, str]:
    """State letter and starting tick; empty where there is no ``/proc``."""
    try:
        # The name, in parentheses, may contain anything.
        fields = (PROC / str(pid) / 'stat').read_text().rpartition(')')[2].split()
    except OSError:
        return '', ''
    return fields[0], fields[19]
