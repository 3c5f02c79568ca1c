"""Forks the ranks of the tests' launches: ``python zygote.py SOCKET``.

Importing torch and the libraries around Megatron costs a process six seconds, and the tests start
hundreds. This one imports them once, listens at the Unix socket SOCKET, and forks for each launch a
supervisor, which forks the ranks, waits for them as torchrun does, and answers with their statuses.
A rank imports this package and Megatron by itself, so that what they do when they are imported, and
from where, is as in a process of its own. It ends when its standard input does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import warnings

# What Megatron's training loop has imported by the end of a run, besides itself and this package.
LIBRARIES = """
    emerging_optimizers.orthogonalized_optimizers jinja2 networkx numpy omegaconf psutil
    safetensors.torch setuptools tensorboard tiktoken torch torch._dynamo
    torch.distributed.checkpoint torch.distributed.fsdp torch.distributed.rpc
    torch.distributed.tensor.experimental torch.nn.attention.flex_attention
    torch.utils.cpp_extension torch.utils.tensorboard transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto triton wandb yaml
""".split()
# How long ranks that were told to end may take.
GRACE = 10.0
POLL = 0.02


def import_libraries() -> None:
    for name in LIBRARIES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # In ranks as in the tests themselves.
    if os.environ.get('TRITON_INTERPRET') == '1' and importlib.util.find_spec('triton'):
        import interpreter_bf16

        interpreter_bf16.install()
    taken = [name for name in sys.modules if name.split('.')[0] in ('megatron', 'megatron_mhc')]
    assert not taken, f'a library has imported {taken}'
    threads = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1
    assert threads == 1, f'{threads} threads: a fork would leave some behind'


def serve(path: str) -> tuple[dict, int] | None:
    """Answer launches; returns in each rank with what it is to run, and here at the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    # The supervisors leave no zombies.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print('ready', flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return supervise(connection)
        connection.close()


def supervise(connection: socket.socket) -> tuple[dict, int]:
    """Start the ranks and wait; returns in a rank only."""
    with connection.makefile() as lines:
        request = json.loads(lines.readline())
    running: dict[int, int] = {}
    for rank in range(len(request['ranks'])):
        pid = os.fork()
        if pid == 0:
            connection.close()
            os.setpgid(0, 0)
            return request, rank
        running[pid] = rank
    statuses: dict[int, int] = {}
    told = 0.0
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            continue
        # Readable is closed: whoever launched does not want them any more.
        closed = bool(select.select([connection], [], [], POLL)[0])
        if not told and (closed or any(statuses.values())):
            told = time.monotonic()
            signal_groups(running, signal.SIGTERM)
        elif told and time.monotonic() > told + GRACE:
            signal_groups(running, signal.SIGKILL)
    with contextlib.suppress(OSError):
        # In the order in which they ended.
        connection.sendall(json.dumps(list(statuses.items())).encode())
    os._exit(0)


def signal_groups(pids: dict[int, int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def become(request: dict, rank: int) -> list[str]:
    """Make this process the one that ``python WORDS...`` would be; returns WORDS."""
    os.environ.clear()
    os.environ.update(request['environment'] | request['ranks'][rank])
    os.chdir(request['folder'])
    for number, name in enumerate((os.devnull, request['stdout'], request['stderr'])):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT if number else os.O_RDONLY
        file = os.open(name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    # Megatron spawns a process for the results of its checkpoint writers, which imports all again.
    multiprocessing.context._concrete_contexts['spawn'] = multiprocessing.get_context('fork')
    if os.environ.get('PYTHONWARNINGS'):
        warnings.simplefilter(os.environ['PYTHONWARNINGS'])
    words = request['words']
    first = os.path.dirname(os.path.realpath(words[0]))
    if words[0] in ('-m', '-c'):
        first = request['folder'] if words[0] == '-m' else ''
    path = os.environ.get('PYTHONPATH', '')
    # An entry of PYTHONPATH that is empty is the current folder.
    sys.path[:] = [first, *(map(os.path.abspath, path.split(os.pathsep)) if path else ()), *BASE]
    return words


def run(words: list[str]) -> int:
    """Run WORDS to their end, exit handlers included; returns the exit status."""
    status: object = None
    try:
        if words[0] == '-m':
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name='__main__', alter_sys=True)
        elif words[0] == '-c':
            sys.argv = ['-c', *words[2:]]
            exec(words[1], {'__name__': '__main__'})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name='__main__')
    except SystemExit as stopped:
        status = stopped.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return int(status or 0) & 0xFF


# The path without this file's folder and without PYTHONPATH.
BASE = [p for p in sys.path[1:] if p not in os.environ.get('PYTHONPATH', '').split(os.pathsep)]

if __name__ == '__main__':
    import_libraries()
    gc.collect()
    gc.freeze()
    launched = serve(sys.argv[1])
    if launched:
        # Taking half a million objects apart costs a rank 0.4 s, and Triton 3.9 calls what was
        # frozen leaked.
        os._exit(run(become(*launched)))
