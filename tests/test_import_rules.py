"""The rooms of this repository import upwards only, and importing the package is light."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ('kernels', 'schedules', 'megatron_mhc', 'patches', 'tools', 'examples', 'tests')
LONGEST = 450  # lines

# Room -> what its files may import, besides the standard library, at module level and within
# functions. A function may import what its room can do without until it is called.
EAGER = {
    'kernels': ('torch', 'triton', 'megatron_mhc.kernels'),
    'schedules': ('megatron_mhc.schedules',),
    'megatron_mhc': ('torch', 'packaging', 'megatron_mhc', 'megatron.core'),
    'patches': ('torch', 'packaging', 'numpy', 'megatron_mhc', 'megatron'),
}
LAZY = {
    'megatron_mhc': (
        *('matplotlib', 'megatron.training', 'numpy', 'safetensors', 'tensorboard', 'tqdm'),
        *('triton', 'yaml'),
    ),
}
# These may need torch: they run a plan instead of describing one.
EXECUTOR = ('schedules/executor',)


def files(*rooms: str) -> list[Path]:
    found = (p for room in rooms for p in (ROOT / room).rglob('*.py'))
    # The links inside the package show the same files a second time.
    return sorted(
        p for p in found if not any(parent.is_symlink() for parent in p.parents if parent != ROOT)
    )


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + '.') for name in allowed)


def violations(path: Path, room: str) -> list[str]:
    found = []
    eager = EAGER[room] + (('torch',) if label(path).startswith(EXECUTOR) else ())
    for module, line, lazy in imports(ast.parse(path.read_text())):
        if module.split('.')[0] in sys.stdlib_module_names:
            continue
        if within(module, eager + LAZY.get(room, ()) if lazy else eager):
            # The package proper reaches down to the patches only when a run begins.
            downwards = room == 'megatron_mhc' and within(module, ('megatron_mhc.patches',))
            if not downwards or lazy:
                continue
        found.append(f'{label(path)}:{line}: {room} may not import {module}')
    return found


@pytest.mark.parametrize('room', list(EAGER))
def test_rooms_import_upwards_only(room):
    found = [violation for path in files(room) for violation in violations(path, room)]
    assert not found, '\n'.join(found)


def test_a_wrong_import_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    path = tmp_path / 'kernels' / 'x.py'
    path.parent.mkdir()
    path.write_text('import math\nimport torch\nfrom megatron import core\n')
    assert violations(path, 'kernels') == ['kernels/x.py:3: kernels may not import megatron.core']


def test_no_relative_and_no_bare_imports():
    found = []
    for path in files(*ROOMS):
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
    rooms = [room for room in ROOMS if room not in ('patches', 'tests')]
    found = [
        f'{label(path)}:{line}'
        for path in files(*rooms)
        for line in rebindings(ast.parse(path.read_text()))
    ]
    assert not found, f'rebinds a Megatron name outside patches/: {found}'


def test_a_rebinding_is_noticed():
    code = 'from megatron.core import mpu as m\nm.size.x = 1\nsetattr(m, "y", 2)\nargs.z = 3\n'
    assert rebindings(ast.parse(code)) == [2, 3]


def test_files_stay_short_and_folders_stay_unimportable():
    long = {label(p): len(p.read_text().splitlines()) for p in files(*ROOMS)}
    assert not {name: count for name, count in long.items() if count > LONGEST}
    # A top-level importable `kernels` or `tools` would hide another library's.
    inits = [
        room for room in ROOMS if room != 'megatron_mhc' and (ROOT / room / '__init__.py').exists()
    ]
    assert not inits


LIGHT = """
import json, sys, time
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('megatron', 'triton', 'transformer_engine', 'apex'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
import torch
start = time.perf_counter()
import megatron_mhc
seconds = time.perf_counter() - start
print(json.dumps({'seconds': seconds, 'cuda': torch.cuda.is_initialized(),
                  'bare': [n for n in ('kernels', 'schedules', 'patches') if n in sys.modules]}))
"""


def test_importing_the_package_is_light(tmp_path):
    """No GPU, no Triton, no Megatron, and less than two seconds more than torch itself."""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    result = subprocess.run(
        [sys.executable, '-c', LIGHT], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen['seconds'] < 2 and not seen['cuda'] and seen['bare'] == []
