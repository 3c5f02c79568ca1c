"""Files of a small tree with seams of its own, one for each way in which a def can stand."""

from __future__ import annotations

import pathlib

INFO = 'MAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ""\n'
GIT = ('git', '-c', 'user.name=t', '-c', 'user.email=t@t', '-c', 'core.autocrlf=false')

# id -> (target, file, source, a function with the same parameters)
FILES = {
    'plain': (
        'megatron.core.plain:work',
        'megatron/core/plain.py',
        b'"""Doc."""\nfrom __future__ import annotations\nimport os\n\n\n'
        b'# pylint: disable=x\ndef work(a, *rest, b=1):\n    return a, rest, b\n\n\n'
        b'work.warned = False\nimport sys\n',
        lambda a, *rest, b=1: None,
    ),
    'windows': (
        'megatron.core.windows:Box.open',
        'megatron/core/windows.py',
        b'import os\r\nclass Box:\r\n    def open(self, x):\r\n        return x',
        lambda self, x: None,
    ),
    'class-method': (
        'megatron.core.kinds:Kinds.make',
        'megatron/core/kinds.py',
        b'class Kinds:\n\t@classmethod\n\tdef make(cls, a, /, **more):\n\t\treturn cls, a, more\n'
        b'\n\t@staticmethod\n\t@__import__("functools").lru_cache(\n\t\tmaxsize=1,\n\t)\n'
        b'\tdef cached(a):\n\t\treturn a\n',
        lambda cls, a, /, **more: None,
    ),
    'cached': ('megatron.core.kinds:Kinds.cached', None, None, lambda a: None),
    'conditional': (
        'megatron.core.package:chosen',
        'megatron/core/package/__init__.py',
        b'#!/usr/bin/env python\n# coding: latin-1\n# \xe9\ntry:\n    import no_such_module\n'
        b'except ImportError:\n    def chosen(*, key):\n        return key\n',
        lambda *, key: None,
    ),
    'imported': (
        'megatron.core.user:helper',
        'megatron/core/user.py',
        b'from .package.helpers import aid as helper\n',
        lambda x: None,
    ),
    'helpers': (
        'megatron.core.package.helpers:aid',
        'megatron/core/package/helpers.py',
        b'"""Two\nlines."""\n@print\ndef first(): pass\n@str\n@print\ndef aid(x): return x\n',
        lambda x: None,
    ),
}
READS = {'plain': ['rest', 'b'], 'conditional': ['key']}
IDS = [id for id in FILES if id != 'helpers']


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file() and '.git' not in path.parts
    }


def execute(tree: pathlib.Path, name: str) -> dict:
    names = {'__name__': 'sample', '__builtins__': __builtins__}
    exec(compile((tree / name).read_bytes(), name, 'exec'), names)
    return names
