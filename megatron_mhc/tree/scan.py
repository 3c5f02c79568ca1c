"""Where the seams belong in a user's Megatron tree, read from its syntax; nothing is imported."""

from __future__ import annotations

import ast
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from megatron_mhc.compat import TESTED, core_minor, nearest_minor, take_as_it_is
from megatron_mhc.tree.edit import (
    IMPORT,
    Function,
    accepted_signature,
    edited_lines,
    fingerprint,
    lines_of,
    parameters,
    placed_seams,
    seam_line,
    signature,
)

SEAMS = pathlib.Path(__file__).parents[1] / 'patches' / 'seams.json'


@dataclasses.dataclass(frozen=True)
class Finding:
    """One seam in one tree.

    Args:
        seam: its row of ``seams.json``.
        state: ``ready``, ``applied``, ``differs`` (another signature), ``renamed``
            (a parameter that the patch reads is gone) or ``missing``.
        path: file, relative to the tree; where it should be, if it is missing.
        detail: what is wrong and the remedy.
        function: what the seam is to be put on; None where that cannot be told.
        placed: whether it is there already.
    """

    seam: dict[str, Any]
    state: str
    path: str
    detail: str = ''
    function: Function | None = None
    placed: bool = False

    @property
    def where(self) -> str:
        return f'{self.path}:{self.function.lineno}' if self.function else self.path


class Tree:
    """A folder that holds ``megatron/core``."""

    def __init__(self, root: pathlib.Path):
        """Raises ValueError where ``root`` is not such a folder or a file of it cannot be read."""
        self.root = root
        self.core = root.absolute() / 'megatron' / 'core'
        self.version = _version(root)
        self.minor = nearest_minor(self.version)
        self.is_tested = core_minor(self.version) in set(map(core_minor, TESTED))
        self._modules: dict[pathlib.Path, ast.Module] = {}
        # Files that hold lines of ours, edited or not.
        self.touched = {
            path: source
            for path in sorted((root / 'megatron').rglob('*.py'))
            if b'mhc_seam' in (source := path.read_bytes()) or b'# megatron-mhc' in source
        }

    def relative(self, path: pathlib.Path) -> str:
        return path.relative_to(self.root).as_posix()

    def edited(self) -> list[str]:
        """``file:line`` of lines of ours that someone changed."""
        return [
            f'{self.relative(path)}:{number}'
            for path, source in self.touched.items()
            for number in edited_lines(source)
        ]

    def _module(self, path: pathlib.Path) -> ast.Module:
        if path not in self._modules:
            try:
                self._modules[path] = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError) as error:
                raise ValueError(f'{self.relative(path)}: not Python: {error}') from error
        return self._modules[path]

    def file_of(self, module: str) -> pathlib.Path:
        """The file of a dotted module name; of the package, if neither is there."""
        stem = self.root.joinpath(*module.split('.'))
        package = stem / '__init__.py'
        return package if package.exists() else stem.with_suffix('.py')

    def findings(self) -> list[Finding]:
        """Every seam that this tree's version has."""
        placed: dict[str, list[tuple[pathlib.Path, Function]]] = {}
        for path in self.touched:
            for id, function in placed_seams(self._module(path)):
                placed.setdefault(id, []).append((path, function))
        rows = [row for row in json.loads(SEAMS.read_text()) if self.minor in row['fingerprints']]
        return [self._finding(row, placed.get(row['id'], [])) for row in rows]

    def _finding(self, row: dict[str, Any], placed: list[tuple[pathlib.Path, Function]]) -> Finding:
        module, _, names = row['target'].partition(':')
        spots = placed or list(self._definitions(self.file_of(module), names.split('.')))
        if not spots:
            return Finding(row, 'missing', self.relative(self.file_of(module)), self._moved(row))
        path, function = spots[0]
        where = self.relative(path)
        if len(spots) > 1:
            places = ', '.join(f'{self.relative(path)}:{f.lineno}' for path, f in spots)
            detail = f'defined {len(spots)} times, {places}; {_by_hand(row, "the right one")}'
            return Finding(row, 'differs', where, detail, placed=bool(placed))
        names = [name for _, name in parameters(function)]
        if gone := [name for name in row['reads'] if name not in names]:
            problem = (
                f'the patch reads {", ".join(gone)}, and it is {signature(function)}; give the '
                'parameter its name in Megatron-Core back'
            )
            return Finding(row, 'renamed', where, problem, function, placed=bool(placed))
        known, seen = row['fingerprints'][self.minor], fingerprint(function)
        if not placed and seen == known:
            return Finding(row, 'ready', where, function=function)
        problem = (
            f'signature {seen} {signature(function)}, expected {known} (megatron-core {self.minor})'
        )
        if not placed:
            detail = f'{problem}; read what changed, {take_as_it_is(self.core)} takes it as it is'
            return Finding(row, 'differs', where, detail, function)
        source = self.touched[path]
        if IMPORT not in [line.rstrip() for line in lines_of(source)]:
            problem = 'the import of mhc_seam is gone'
        elif seen == accepted_signature(source, row['id']) or (seen == known and self.is_tested):
            return Finding(row, 'applied', where, '', function, placed=True)
        elif seen == known:
            problem = f'put here when the tree was another release than {self.version}'
        detail = f'{problem}; --reverse, then --apply again'
        return Finding(row, 'differs', where, detail, function, placed=True)

    def _definitions(
        self, path: pathlib.Path, names: list[str]
    ) -> Iterator[tuple[pathlib.Path, Function]]:
        """Functions of a dotted name, in ``path`` or in the file that it imports the name from."""
        if not path.is_file():
            return
        statements = list(_statements(self._module(path).body))
        for name in names[:-1]:
            classes = [s for s in statements if isinstance(s, ast.ClassDef) and s.name == name]
            statements = [s for c in classes for s in _statements(c.body)]
        found = [s for s in statements if isinstance(s, Function) and s.name == names[-1]]
        yield from ((path, function) for function in found)
        if found or len(names) > 1:
            return
        for statement in statements:
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == names[0]:
                        source = self.file_of(self._source(path, statement))
                        if source != path:
                            yield from self._definitions(source, [alias.name])

    def _source(self, path: pathlib.Path, statement: ast.ImportFrom) -> str:
        """The absolute name of the module of ``from ... import``."""
        parents = path.relative_to(self.root).parts[: -statement.level or None]
        base = parents if statement.level else ()
        return '.'.join((*base, *filter(None, [statement.module])))

    def _moved(self, row: dict[str, Any]) -> str:
        """Where else a definition of that name is."""
        name = row['target'].partition(':')[2].split('.')
        pattern = re.compile(rb'^[ \t]*(class|def) %b\b' % name[0].encode(), re.MULTILINE)
        places = []
        for path in sorted((self.root / 'megatron').rglob('*.py')):
            source = path.read_bytes()
            for match in pattern.finditer(source):
                places.append(f'{self.relative(path)}:{source.count(b"\n", 0, match.start()) + 1}')
        found = f'; {name[0]} is defined at {", ".join(places[:3])}' if places else ''
        return f'{row["target"]} is not there{found}; {_by_hand(row, "what took its place")}'


def _by_hand(row: dict[str, Any], where: str) -> str:
    return f'put `{seam_line(row["id"])}` above {where} and `{IMPORT.decode()}` above that'


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block and of its conditions, not of its functions and classes."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ('body', 'orelse', 'finalbody'):
                yield from _statements(getattr(statement, part, []))
            for handler in getattr(statement, 'handlers', []):
                yield from _statements(handler.body)


def _version(root: pathlib.Path) -> str:
    info = root / 'megatron' / 'core' / 'package_info.py'
    if not info.is_file():
        raise ValueError(
            f'{root}: no megatron/core/package_info.py; name the folder that holds megatron/'
        )
    try:
        statements = ast.parse(info.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f'{info}: not Python: {error}; restore this file') from None
    numbers = {
        statement.targets[0].id: statement.value.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, int | str)
    }
    try:
        return '.'.join(str(int(numbers[name])) for name in ('MAJOR', 'MINOR', 'PATCH'))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f'{info}: no MAJOR, MINOR and PATCH; is this Megatron-Core?') from None


def known_releases() -> str:
    """The releases whose signatures are recorded, for messages."""
    return ', '.join(sorted({core_minor(version) for version in TESTED}))
