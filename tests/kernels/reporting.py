"""``kernels report`` in a process of its own, where Triton compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Several command lines in one process, which imports torch once: a JSON line for each.
COMMANDS = """
import contextlib, io, json, sys
from megatron_mhc.cli import main
for options in json.loads(sys.argv[1]):
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(['kernels', 'report', *options])
        except SystemExit as end:
            status = end.code
    print(json.dumps([status or 0, out.getvalue(), err.getvalue()]))
"""


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def compiling(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """``code`` in a process of its own, where Triton compiles."""
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, '-c', code, *words],
        env=env | environment,
        capture_output=True,
        text=True,
    )


def reports(*commands: tuple[str, ...], code: str = '', **environment: str) -> list[Done]:
    """``kernels report`` with each of ``commands``, after ``code``."""
    process = compiling(code + COMMANDS, json.dumps(commands), **environment)
    assert process.returncode == 0, process.stderr
    return [Done(*json.loads(line)) for line in process.stdout.splitlines()]
