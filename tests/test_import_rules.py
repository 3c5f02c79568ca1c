"""Rooms import the rows above them only, also lazily, and importing the package is light."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'megatron_mhc'
FOLDERS = ('kernels', 'schedules', PACKAGE, 'patches', 'tools', 'examples', 'tests')
LONGEST = 450  # lines
# transformers reads one file beside the weights, which imports torch and transformers alone.
MODELING = 'megatron_mhc/convert/hf/modeling_megatron_mhc.py'

# Room -> the rooms that it may import, all of them above it. ``.name`` is a file at the root.
ROOMS = {
    '.compat': '',
    'inputs': '',
    'kernels': '',
    'schedules': '',
    '.op_inputs': 'inputs kernels',
    '.ops': 'kernels .op_inputs',
    'manifolds': '.ops',
    'settings': 'inputs kernels schedules manifolds',
    'checkpoints': 'inputs settings',
    'residual': 'inputs kernels schedules .ops manifolds settings',
    '.__init__': '.ops settings residual',
    'mudd': 'kernels settings residual',
    'monitor': 'inputs .ops settings residual',
    'optim': 'settings checkpoints',
    'pipeline': 'inputs schedules settings residual',
    'runtime': 'inputs kernels settings checkpoints',
    'engram': 'inputs kernels settings checkpoints residual optim',
    'sizing': 'schedules manifolds settings mudd engram',
    'trace': 'inputs kernels',
    'patches': 'inputs .compat schedules settings checkpoints residual mudd monitor optim pipeline '
    'runtime engram sizing',
    '.seam': 'inputs patches',
    'tree': 'inputs .compat .seam',
    '.bootstrap': 'inputs .compat settings runtime patches',
    '.adaptor': '.bootstrap',
    'convert': 'inputs kernels schedules .ops manifolds settings checkpoints residual mudd runtime '
    '.bootstrap',
    'recipes': 'inputs schedules manifolds settings sizing .bootstrap',
    'study': 'inputs kernels schedules settings sizing recipes .bootstrap',
    'commands': 'inputs .compat kernels schedules settings residual .__init__ runtime trace '
    'patches',
    '.run': 'inputs settings runtime .bootstrap',
    '.cli': 'inputs .__init__ runtime monitor tree convert recipes study commands .run',
    '.__main__': '.cli',
}
# What else a room may import, besides the standard library: at module level, and within functions.
# A function may import what its room can do without until it is called.
PACKAGE_LIBRARIES = 'torch packaging megatron.core'
# Rooms that describe and parse: help is printed, and ResidualConfig made, without torch.
LIGHT_ROOMS = (
    'inputs settings trace tree recipes study commands .__init__ .__main__ .adaptor .bootstrap '
    '.cli .compat .run .seam'
)
LIGHT_LIBRARIES = 'packaging'
LIBRARIES = {
    'kernels': 'torch triton',
    'schedules': '',
    'patches': 'torch packaging numpy megatron',
}
LAZY_LIBRARIES = (
    'jinja2 matplotlib megatron.core megatron.training numpy safetensors shtab tensorboard tqdm '
    'torch transformers triton yaml'
)
# These may need torch: they run what the others of their room describe.
NEED_TORCH = tuple(
    f'{PACKAGE}.{name}'
    for name in ('schedules.executor', 'commands.storage_meter', 'recipes.build')
)


def files(*folders: str) -> list[Path]:
    found = (p for folder in folders for p in (ROOT / folder).rglob('*.py'))
    # The links inside the package show the same files a second time.
    return sorted(
        p for p in found if not any(parent.is_symlink() for parent in p.parents if parent != ROOT)
    )


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The name under which the package has the file; links lead to three of its rooms."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    inner = parts[:-1] if parts[-1] == '__init__' and len(parts) > 2 else parts
    return '.'.join(inner)


def room_of(module: str, modules: dict[str, Path]) -> str | None:
    """The room of what is imported as ``module``, an attribute or a module; None if not ours."""
    parts = module.split('.')
    if parts[0] != PACKAGE:
        return None
    if len(parts) > 1 and (parts[1] in ROOMS or '.'.join(parts[:2]) in modules):
        return parts[1] if parts[1] in ROOMS else f'.{parts[1]}'
    return '.__init__'


def imports(tree: ast.Module):
    """``(module, line, lazy)`` of each import; ``from a import b`` counts as ``a.b`` too."""
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef) or type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            prefix = '.' * node.level + (node.module or '')
            # `from megatron_mhc import kernels` reaches into a room as much as a dotted import.
            for alias in node.names:
                yield f'{prefix}.{alias.name}', node.lineno, id(node) in lazy


def named(path: Path, tree: ast.Module, modules: dict[str, Path]):
    """``(module, line)`` of modules that are imported by their name in a string."""
    command = label(path) == f'{PACKAGE}/cli.py'
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # The table of commands leaves out the package.
            name = f'{PACKAGE}.{node.value}' if command else node.value
            if name in modules and name != PACKAGE and not node.value.startswith('_'):
                yield name, node.lineno


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + '.') for name in allowed)


def arrows() -> dict[tuple[str, str], list[str]]:
    """``(room, room that it imports)`` -> where."""
    modules = {module_of(path): path for path in files('kernels', 'schedules', PACKAGE, 'patches')}
    found = {}
    for module, path in modules.items():
        room, tree = room_of(module, modules), ast.parse(path.read_text())
        ours = [(name, line) for name, line, _ in imports(tree) if within(name, (PACKAGE,))]
        for name, line in [*ours, *named(path, tree, modules)]:
            other = room_of(name, modules)
            if other != room:
                found.setdefault((room, other), []).append(f'{label(path)}:{line}')
    return found


def test_rooms_import_what_their_row_allows():
    """Rows name earlier rows only, so that no circle is left, by whatever way it would go."""
    order = list(ROOMS)
    upwards = [
        f'{room} -> {other}'
        for room, row in ROOMS.items()
        for other in row.split()
        if order.index(other) >= order.index(room)
    ]
    found = arrows()
    wrong = [
        f'{place}: {room} may not import {other}'
        for (room, other), places in found.items()
        if other not in ROOMS[room].split()
        for place in places
    ]
    floors = {}
    for room in order:
        below = [floors[other] for from_, other in found if from_ == room and other in floors]
        floors[room] = 1 + max(below, default=-1)
    print(
        f'rooms: {len(order)}, floors: {max(floors.values()) + 1}, arrows: {len(found)}, '
        f'upward: {len(upwards)}, not in a row: {len(wrong)}'
    )
    assert not upwards and not wrong, '\n'.join([*upwards, *wrong])
    unused = [
        f'{room}: {other}'
        for room, row in ROOMS.items()
        for other in row.split()
        if (room, other) not in found
    ]
    assert not unused, f'allowed, but not needed: {unused}'


def test_the_page_has_every_room_in_this_order():
    page = (ROOT / PACKAGE / 'docs' / 'architecture.md').read_text()
    assert re.findall(r'^\| `([\w.]+)` \|', page, re.MULTILINE) == list(ROOMS)


def test_every_folder_is_a_room():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / '__init__.py').exists()}
    assert folders <= ROOMS.keys()


def test_a_circle_is_noticed(tmp_path, monkeypatch):
    """Through a link, in a function, and by a name in a string."""
    for name, text in {
        'megatron_mhc/__init__.py': '',
        'megatron_mhc/settings/__init__.py': 'def f():\n    from megatron_mhc.patches import x\n',
        'megatron_mhc/inputs/__init__.py': "NAME = 'megatron_mhc.patches.x'\n",
        'megatron_mhc/cli.py': "TABLE = {'x': 'inputs'}\n",
        'patches/x.py': 'import megatron_mhc.settings\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'megatron_mhc' / 'patches').symlink_to('../patches')
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    assert arrows() == {
        ('settings', 'patches'): ['megatron_mhc/settings/__init__.py:2'],
        ('inputs', 'patches'): ['megatron_mhc/inputs/__init__.py:1'],
        ('.cli', 'inputs'): ['megatron_mhc/cli.py:1'],
        ('patches', 'settings'): ['patches/x.py:1'],
    }
    with pytest.raises(AssertionError, match='settings may not import patches'):
        test_rooms_import_what_their_row_allows()


def foreign_libraries(path: Path) -> list[str]:
    folder, module = label(path).split('/')[0], module_of(path)
    modules = {module: path}
    light = folder == PACKAGE and room_of(module, modules) in LIGHT_ROOMS.split()
    eager = (LIGHT_LIBRARIES if light else LIBRARIES.get(folder, PACKAGE_LIBRARIES)).split()
    if module.startswith(NEED_TORCH):
        eager.append('torch')
    lazy = LAZY_LIBRARIES.split() if folder == PACKAGE else []
    if label(path) == MODELING:
        eager, lazy = ['torch', 'transformers'], []
    found = []
    for name, line, in_function in imports(ast.parse(path.read_text())):
        known = name.split('.')[0] in sys.stdlib_module_names or within(name, (PACKAGE,))
        allowed = (*eager, *lazy) if in_function else tuple(eager)
        if not known and not within(name, allowed):
            found.append(f'{label(path)}:{line}: {folder} may not import {name}')
    return found


def test_libraries():
    found = [
        line
        for path in files('kernels', 'schedules', PACKAGE, 'patches')
        for line in foreign_libraries(path)
    ]
    assert not found, '\n'.join(found)


def test_a_wrong_library_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    path = tmp_path / 'kernels' / 'x.py'
    path.parent.mkdir()
    path.write_text('import math\nimport torch\nfrom megatron import core\n')
    assert foreign_libraries(path) == ['kernels/x.py:3: kernels may not import megatron.core']
    path = tmp_path / PACKAGE / 'settings' / 'x.py'
    path.parent.mkdir(parents=True)
    path.write_text('import torch\ndef f():\n    import torch\n')
    found = foreign_libraries(path)
    assert found == ['megatron_mhc/settings/x.py:1: megatron_mhc may not import torch']


def test_no_relative_and_no_bare_imports():
    found = []
    for path in files(*FOLDERS):
        for module, line, _ in imports(ast.parse(path.read_text())):
            if module.split('.')[0] in ('', 'kernels', 'schedules', 'patches', 'tools', 'tests'):
                found.append(f'{label(path)}:{line}: {module}: import megatron_mhc....')
    assert not found, '\n'.join(found)


def root_name(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def rebindings(tree: ast.Module) -> list[int]:
    """Lines that set or delete an attribute of something imported from Megatron."""
    imported = {
        (alias.asname or alias.name).split('.')[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if within(getattr(node, 'module', None) or alias.name, ('megatron',))
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = root_name(node)
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('setattr', 'delattr'):
            target = root_name(node.args[0])
        else:
            continue
        if target in imported:
            lines.append(node.lineno)
    return lines


def test_only_patches_rebind_megatron_names():
    folders = [folder for folder in FOLDERS if folder not in ('patches', 'tests')]
    found = [
        f'{label(path)}:{line}'
        for path in files(*folders)
        for line in rebindings(ast.parse(path.read_text()))
    ]
    assert not found, f'rebinds a Megatron name outside patches/: {found}'


def test_a_rebinding_is_noticed():
    code = 'from megatron.core import mpu as m\nm.size.x = 1\nsetattr(m, "y", 2)\nargs.z = 3\n'
    assert rebindings(ast.parse(code)) == [2, 3]


def test_files_stay_short_and_folders_stay_unimportable():
    long = {label(p): len(p.read_text().splitlines()) for p in files(*FOLDERS)}
    del long[MODELING]
    assert not {name: count for name, count in long.items() if count > LONGEST}
    # A top-level importable `kernels` or `tools` would hide another library's.
    inits = [
        folder
        for folder in FOLDERS
        if folder != PACKAGE and (ROOT / folder / '__init__.py').exists()
    ]
    assert not inits


LIGHT = """
import json, sys, time
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('megatron', 'triton', 'transformer_engine', 'apex'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
start = time.perf_counter()
import megatron_mhc
megatron_mhc.ResidualConfig('mhc')
seconds, torch = time.perf_counter() - start, 'torch' in sys.modules
print(json.dumps({'seconds': seconds, 'torch': torch,
                  'bare': [n for n in ('kernels', 'schedules', 'patches') if n in sys.modules]}))
"""


def test_importing_the_package_is_light(tmp_path):
    """No torch, no GPU, no Triton, no Megatron, and less than two seconds; settings included."""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    result = subprocess.run(
        [sys.executable, '-c', LIGHT], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen['seconds'] < 2 and not seen['torch'] and seen['bare'] == []
