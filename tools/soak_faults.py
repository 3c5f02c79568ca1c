"""What goes wrong in a soak, and when: drawn from a seed, written to a file, read by the ranks."""

import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

# kind -> most seconds into the step (how long the rank is slow, for ``slow``)
KINDS = {'kill': 0.3, 'drop': 0.3, 'stop': 0.3, 'slow': 1.0}
FILE, FIRED = 'faults.json', 'fired'


class Fault(NamedTuple):
    """``kind`` happens once to ``rank``, ``seconds`` after it begins ``iteration``.

    kill: it is gone, as for want of memory. drop: all its connections are shut, as by a lost link.
    stop: it does nothing any more, with its connections open. slow: it sleeps for ``seconds``.
    """

    iteration: int
    rank: int
    kind: str
    seconds: float


def draw(seed: int, iterations: int, world: int, counts: dict[str, int]) -> list[Fault]:
    """``counts[kind]`` faults of each kind, at different iterations, in order."""
    generator = random.Random(seed)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    when = sorted(generator.sample(range(2, iterations + 1), len(kinds)))
    generator.shuffle(kinds)
    return [
        Fault(iteration, generator.randrange(world), kind, generator.uniform(0, KINDS[kind]))
        for iteration, kind in zip(when, kinds, strict=True)
    ]


def write(folder: Path, faults: list[Fault]) -> None:
    (folder / FIRED).mkdir(parents=True)
    (folder / FILE).write_text(json.dumps(faults))


def fired(folder: Path) -> dict[Fault, float]:
    """Those that have happened, and when: seconds since the epoch."""
    faults = [Fault(*entry) for entry in json.loads((folder / FILE).read_text())]
    times = {int(path.name): float(path.read_text()) for path in (folder / FIRED).iterdir()}
    return {faults[number]: times[number] for number in sorted(times)}


class Injector:
    """Does to this rank what the file in ``folder`` says, each fault once in all restarts."""

    def __init__(self, folder: Path, rank: int):
        self._fired = folder / FIRED
        faults = enumerate(Fault(*entry) for entry in json.loads((folder / FILE).read_text()))
        self._mine = {f.iteration: (n, f) for n, f in faults if f.rank == rank}

    def begin(self, iteration: int) -> None:
        """Called before each step."""
        number, fault = self._mine.get(iteration, (0, None))
        if fault is None or (self._fired / str(number)).exists():
            return
        if fault.kind == 'slow':
            self._happen(number, fault)
        else:
            threading.Timer(fault.seconds, self._happen, (number, fault)).start()

    def _happen(self, number: int, fault: Fault) -> None:
        (self._fired / str(number)).write_text(repr(time.time()))
        if fault.kind == 'slow':
            time.sleep(fault.seconds)
        elif fault.kind == 'drop':
            shut_connections()
        else:
            os.kill(os.getpid(), {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP}[fault.kind])


def shut_connections() -> None:
    """Shut every TCP connection of this process, both ways."""
    for name in os.listdir('/proc/self/fd'):
        try:
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            # No socket, or closed since.
            continue
        with copy:
            try:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    copy.shutdown(socket.SHUT_RDWR)
            except OSError:
                # Not connected.
                pass
