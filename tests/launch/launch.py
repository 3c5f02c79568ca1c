"""Start ranks as ``python`` and ``torchrun`` do, without what importing torch costs each of them.

Ranks are forked by ``zygote.py``, one for each process of pytest. Where real processes are the
matter (which path Python gives them, signals, torchrun's own report) tests start these.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

import torch

# Libraries read these when they are imported, so that the zygote's are those of every rank.
READ_AT_IMPORT = ('TORCHDYNAMO_DISABLE', 'TRITON_INTERPRET', 'OMP_NUM_THREADS')
SAME_FOR_ALL = {'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
WITHOUT_RANKS = ({},)


class Zygote:
    """The process that forks, and the folder in which it listens and its ranks write."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='zygote-'))
        self.environment = os.environ | SAME_FOR_ALL
        self.launches = 0
        self.process = subprocess.Popen(
            [sys.executable, pathlib.Path(__file__).with_name('zygote.py'), self.folder / 'socket'],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.end)
        assert self.process.stdout.readline() == 'ready\n', 'the zygote did not start'

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_zygote: list[Zygote] = []


@dataclasses.dataclass
class Running:
    """Ranks that were started. ``store`` is where they meet."""

    words: list[str]
    connection: socket.socket
    output: pathlib.Path
    store: torch.distributed.TCPStore | None

    def result(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for them, at most ``timeout`` seconds; the status is the first that is not 0."""
        self.connection.settimeout(timeout)
        with self.connection:
            try:
                with self.connection.makefile() as answer:
                    statuses = json.loads(answer.read())
            except TimeoutError:
                raise subprocess.TimeoutExpired(
                    self.words, timeout, *map(pathlib.Path.read_bytes, self._files())
                ) from None
        out, err = (file.read_text(errors='replace') for file in self._files())
        status = next((status for _, status in statuses if status), 0)
        return subprocess.CompletedProcess(self.words, status, out, err)

    def _files(self) -> tuple[pathlib.Path, pathlib.Path]:
        return self.output.with_suffix('.out'), self.output.with_suffix('.err')


def start(world: int, *words: object, folder: object = None, **environment: object) -> Running:
    """``torchrun --nproc-per-node WORLD WORDS...``, or ``python WORDS...`` where ``world`` is 0.

    ``words`` begin with ``-m MODULE``, ``-c CODE`` or a script. ``environment`` is laid over this
    process's. Both ranks write to the same two files.
    """
    if not _zygote:
        _zygote.append(Zygote())
    zygote = _zygote[0]
    ours = {**os.environ, **SAME_FOR_ALL, **{k: str(v) for k, v in environment.items()}}
    for name in READ_AT_IMPORT:
        assert ours.get(name) == zygote.environment.get(name), f'{name} is read at import'
    store, ranks = None, list(WITHOUT_RANKS)
    if world:
        # As under torchrun the ranks join a store that is there, instead of opening a port.
        store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
        ranks = [
            {
                'RANK': str(rank),
                'LOCAL_RANK': str(rank),
                'WORLD_SIZE': str(world),
                'LOCAL_WORLD_SIZE': str(world),
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(store.port),
                'TORCHELASTIC_USE_AGENT_STORE': 'True',
                'TORCHELASTIC_RESTART_COUNT': '0',
                'TORCHELASTIC_RUN_ID': 'tests',
            }
            for rank in range(world)
        ]
    zygote.launches += 1
    output = zygote.folder / str(zygote.launches)
    running = Running([str(word) for word in words], socket.socket(socket.AF_UNIX), output, store)
    for file in running._files():
        file.touch()
    running.connection.connect(str(zygote.folder / 'socket'))
    stdout, stderr = map(str, running._files())
    request = {
        'words': running.words,
        'folder': str(folder or pathlib.Path.cwd()),
        'environment': ours,
        'ranks': ranks,
        'stdout': stdout,
        'stderr': stderr,
    }
    running.connection.sendall(json.dumps(request).encode() + b'\n')
    return running


def launch(
    world: int, *words: object, timeout: float = 300, **options: object
) -> subprocess.CompletedProcess:
    """``start`` and wait: like ``subprocess.run`` with the output captured as text."""
    return start(world, *words, **options).result(timeout)
