"""Files and folders that no command can read, and every argument that names one."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
from pathlib import Path

from one_line import Row

# A kernel as torch's profiler writes it, for traces that are nearly right.
KERNEL = {'ph': 'X', 'cat': 'kernel', 'name': 'k', 'pid': 0, 'tid': 7, 'ts': 1, 'dur': 1}
KERNEL |= {'args': {'stream': 7, 'correlation': 1}}


def _events(**changed) -> bytes:
    return json.dumps({'traceEvents': [KERNEL | changed]}).encode()


CONTENTS = {
    'empty': b'',
    'binary': bytes(range(256)) * 8,
    'cut.json': _events()[:-20],
    'words.json': b'"words"',
    'nested.json': b'[' * 100_000,
    'digits.json': b'{"traceEvents": [' + b'9' * 5000 + b']}',
    'cut.json.gz': gzip.compress(_events() * 100)[:-30],
    'not-utf-8.json': b'{"traceEvents": [{"name": "\xff\xfe"}]}',
    'no-kernels.json': _events(cat='cpu_op'),
    'infinite.json': b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, '
    b'"tid": 7, "ts": 1e999, "args": {}}]}',
    'no-time.json': _events(ts=None),
    'odd-time.json': _events(ts='soon'),
    'odd-args.json': _events(args=[]),
    'cut.csv': b'op,n,C\nmapping,4',
}
KINDS = ('missing', 'folder', 'pipe', *CONTENTS)

# Arguments of a command before and after the file.
TAKES_A_FILE = (
    ('schedule trace', '', KINDS),
    ('kernels report --record', '', ('missing', 'folder', 'pipe', 'empty', 'binary')),
    ('study 3b --kernel-times', '', ('missing', 'folder', 'pipe', 'empty', 'binary', 'cut.csv')),
    ('schedule show --plan', '', ('missing', 'folder', 'pipe', 'binary')),
    ('report', '', KINDS),
    ('run', '', ('missing', 'folder', 'pipe')),
)
TOOL_TAKES_A_FILE = (
    ('plot_losses.py --output x.png', 'a=', ('missing', 'empty', 'binary', 'folder')),
    ('prepare_corpus.py --output c --source', '', ('missing', 'empty', 'folder')),
    ('prepare_corpus.py --output', '', ('empty', 'binary')),
    ('quickstart.py train --output', '', ('empty', 'binary')),
    ('recipe.py 3b --save', '', ('empty', 'binary')),
    ('bench.py --device cpu --output', '', ('empty', 'binary')),
)


def write_files(folder: Path) -> None:
    """One file, folder or pipe of each kind."""
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    (folder / 'folder').mkdir()
    os.mkfifo(folder / 'pipe')
    with sqlite3.connect(folder / 'sqlite') as database:
        database.execute('CREATE TABLE StringIds (id, value)')


def rows(table=TAKES_A_FILE) -> list[Row]:
    return [
        Row((*command.split(), before + kind), (kind,))
        for command, before, kinds in table
        for kind in kinds
    ]
