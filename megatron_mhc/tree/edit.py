"""The lines that ``megatron-mhc patch`` adds to a file of Megatron: how they look, go in and out.

Every line is added whole and can be told from all others by its text alone. So taking them out is
exact whatever else changed since, and nothing has to be remembered anywhere.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence

IMPORT = b'from megatron_mhc.seam import mhc_seam'
IMPORT += b'  # megatron-mhc: install it, or undo with patch --reverse'
SEAM = re.compile(
    rb'[ \t]*@mhc_seam\("(?P<id>[a-z0-9-]+)"(, accept="(?P<accept>[0-9a-f]{8})")?\)'
    rb'  # megatron-mhc'
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def seam_line(id: str, accept: str | None = None) -> str:
    """The decorator that is put above a ``def``, without its indentation."""
    # Double quotes: the formatters that Megatron's users run leave them alone.
    return f'@mhc_seam("{id}"' + (f', accept="{accept}")' if accept else ')') + '  # megatron-mhc'


def lines_of(source: bytes) -> list[bytes]:
    """Lines as Python counts them, with their ends."""
    return source.splitlines(keepends=True)


def is_ours(line: bytes) -> bool:
    """Whether a line is, to the letter, one that this tool adds."""
    text = line.rstrip(b'\r\n')
    return text == IMPORT or SEAM.fullmatch(text) is not None


def without_our_lines(source: bytes) -> bytes:
    """``source`` as it was before anything was added."""
    return b''.join(line for line in lines_of(source) if not is_ours(line))


def edited_lines(source: bytes) -> list[int]:
    """Numbers of lines that look like ours but were changed by someone."""
    return [
        number
        for number, line in enumerate(lines_of(source), 1)
        if (b'mhc_seam' in line or line.rstrip().endswith(b'# megatron-mhc')) and not is_ours(line)
    ]


def accepted_signature(source: bytes, id: str) -> str | None:
    """The fingerprint that a seam in ``source`` says its user vouches for."""
    matches = (SEAM.fullmatch(line.rstrip(b'\r\n')) for line in lines_of(source))
    accepted = [m['accept'] for m in matches if m and m['id'].decode() == id and m['accept']]
    return accepted[0].decode() if accepted else None


def fingerprint(function: Function) -> str:
    """``patches.engine.fingerprint`` of a function that is not imported but read."""
    text = ','.join(f'{kind}:{name}' for kind, name in parameters(function))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def signature(function: Function) -> str:
    """Names of the parameters, for people."""
    stars = {'VL': '*', 'VD': '**'}
    names = [stars.get(kind, '') + name for kind, name in parameters(function)]
    return f'{function.name}({", ".join(names)})'


def parameters(function: Function) -> Iterator[tuple[str, str]]:
    """Kind and name of every parameter, in order."""
    arguments = function.args
    # First and last letter of what ``inspect`` calls the kind.
    for kind, parameters in (
        ('PY', arguments.posonlyargs),
        ('PD', arguments.args),
        ('VL', [arguments.vararg]),
        ('KY', arguments.kwonlyargs),
        ('VD', [arguments.kwarg]),
    ):
        yield from ((kind, parameter.arg) for parameter in parameters if parameter is not None)


def placed_seams(module: ast.Module) -> Iterator[tuple[str, Function]]:
    """``(id, function)`` of every seam in a file."""
    for node in ast.walk(module):
        if not isinstance(node, Function):
            continue
        for decorator in node.decorator_list:
            match decorator:
                case ast.Call(func=ast.Name('mhc_seam'), args=[ast.Constant(str(id))]):
                    yield id, node


def add_seams(source: bytes, seams: Sequence[tuple[Function, str]]) -> bytes:
    """Put ``seam_line``s above functions of ``source``, and the import of the decorator.

    Raises:
        ValueError: a line cannot be added without changing one that is there.
    """
    lines = lines_of(source)
    module = ast.parse(source)
    inserted = {}
    for function, text in seams:
        # Above its other decorators, where a name that is rebound at run time is wrapped too.
        row = min(node.lineno for node in (function, *function.decorator_list)) - 1
        code = lines[row].lstrip(b' \t')
        indentation = lines[row].removesuffix(code)
        if not re.match(rb'@|def\b|async\b', code):
            raise ValueError(f'line {row + 1}: {function.name} shares its line with other code')
        inserted[row] = indentation + text.encode() + _end_of(lines[row])
    if not any(line.rstrip(b'\r\n') == IMPORT for line in lines):
        row = _row_of_import(module, before=min(inserted))
        inserted[row] = IMPORT + _end_of(lines[row - 1 if row else 0]) + inserted.get(row, b'')
    result = b''.join(inserted.get(row, b'') + line for row, line in enumerate(lines))
    _check(result, {text for _, text in seams})
    return result


def _end_of(line: bytes) -> bytes:
    return line[len(line.rstrip(b'\r\n')) :]


def _last_line(node: ast.stmt) -> int:
    # Only a tree that nobody has parsed lacks it.
    return node.end_lineno or node.lineno


def _row_of_import(module: ast.Module, before: int) -> int:
    """After the last import above the first seam, else after the docstring, else at the top."""
    imports = [
        _last_line(node) for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    above = [line for line in imports if line <= before]
    if above:
        return above[-1]
    first = module.body[0]
    if ast.get_docstring(module, clean=False) is not None:
        return _last_line(first)
    decorators: list[ast.expr] = getattr(first, 'decorator_list', [])
    return min([first.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def _id_of(text: str) -> str:
    seam = SEAM.fullmatch(text.encode())
    assert seam is not None
    return seam['id'].decode()


def _check(result: bytes, texts: set[str]) -> None:
    """Read the outcome again: every added line is where Python takes it for what it is."""
    try:
        module = ast.parse(result)
    except SyntaxError as error:
        raise ValueError(f'line {error.lineno}: no line can be added here') from error
    imported = any(
        isinstance(node, ast.ImportFrom) and node.module == 'megatron_mhc.seam'
        for node in module.body
    )
    found = {id for id, _ in placed_seams(module)}
    wanted = {_id_of(text) for text in texts}
    if not imported or not wanted <= found:
        raise ValueError('no line can be added beside a statement that shares its line')
