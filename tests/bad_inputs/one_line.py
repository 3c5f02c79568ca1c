"""Runs a command in this process and holds its refusal against the rule.

The rule: status 2, no traceback anywhere, and a last line on stderr that names the flag or symbol
and its value and has a remedy, all within seconds.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

SECONDS = 20
REMEDY = re.compile(
    r'; \S|[:,] (choose|give|use|name|take|add|drop|leave|set) |wanted|are required'
)
# A long value may be cut short in the line.
KEPT = 40


class Row(NamedTuple):
    """A bad command line, and what its refusal has to name: flag or symbol, and value."""

    line: tuple[str, ...]
    names: tuple[str, ...]


def single(line: str, flag: str, values: tuple[str, ...]) -> list[Row]:
    """``line`` with ``flag`` at each of ``values``; what ``line`` says of it already gives way."""
    return [
        Row((*line.split(), f'{flag}={value}'), (flag, value.strip()[:KEPT])) for value in values
    ]


def said(line: str, *names: str) -> Row:
    """A whole line, and the words that its refusal must have."""
    return Row(tuple(line.split()), names)


def all_rows(lines: tuple[Row, ...], kinds: tuple[tuple, ...]) -> list[Row]:
    """``lines``, and of ``kinds``, (line, flags, values), every flag at every value."""
    found = list(lines)
    for line, flags, values in kinds:
        for flag in flags:
            found += single(line, flag, values)
    return found


def label(row: Row) -> str:
    """The id of a test: short, and in ASCII."""
    return ascii(' '.join(row.line))[1:-1][:120]


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise where the body takes too long, rather than to wait for ever."""

    def late(*_signal):
        raise AssertionError(f'no refusal within {SECONDS} s')

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(run: Callable[[list[str]], object], row: Row) -> None:
    """Raise AssertionError unless ``run`` refuses the line of ``row`` as the rule has it."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), in_time():
        try:
            status = run(list(row.line))
        except SystemExit as ended:
            status = ended.code
    check_refusal(status, out.getvalue(), err.getvalue(), row.names)


def check_refusal(status: object, out: str, err: str, names: tuple[str, ...]) -> None:
    assert status == 2, f'status {status}: {(out + err)[-500:]}'
    assert 'Traceback' not in out + err
    assert err.endswith('\n') and err.strip(), err
    check_message(err.rstrip('\n').rpartition('\n')[2], names)


def check_message(line: str, names: tuple[str, ...]) -> None:
    """Raise AssertionError unless a message is one line with names and a remedy."""
    assert '\n' not in line
    for name in names:
        assert name in line, f'{name!r} is not in: {line}'
    assert REMEDY.search(line), f'no remedy: {line}'
