"""Parts of a conversion that need Megatron's process groups run in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from megatron_mhc.runtime.script_path import same_path_for_a_child


class NoAnswer(RuntimeError):
    """The worker failed; the text is the last line that it wrote."""


def answer(module: str, *words: str) -> Any:
    """What ``python -m MODULE WORDS`` prints last, which is JSON.

    It finds the Megatron that this process finds.

    Raises:
        NoAnswer: it failed.
    """
    done = run(module, *words)
    if done.returncode:
        raise NoAnswer((done.stderr.strip().splitlines() or ['no message'])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE WORDS``, with this process's path, to its end."""
    options, environment = same_path_for_a_child()
    command = [sys.executable, *options, '-m', module, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
