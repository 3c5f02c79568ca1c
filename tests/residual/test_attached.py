"""What tensors and Megatron's configs carry for us, and that nobody writes it past its module."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mhc.residual import attached
from megatron_mhc.residual.attached import IN_FLIGHT, READ_AHEAD, SEGMENT, Attached
from megatron_mhc.settings import model_config
from megatron_mhc.settings.model_config import RESIDUAL, OnConfig

ROOT = Path(__file__).parents[2]
TENSOR = {name: value for name, value in vars(attached).items() if isinstance(value, Attached)}
CONFIG = {name: value for name, value in vars(model_config).items() if isinstance(value, OnConfig)}
ON_TENSORS = {value.name for value in TENSOR.values()}
ON_CONFIGS = {value.name for value in CONFIG.values()}
HOMES = ('megatron_mhc/residual/attached.py', 'megatron_mhc/settings/model_config.py')


def test_what_is_taken_is_gone_and_what_is_peeked_stays():
    x = torch.ones(2)
    assert SEGMENT.take(x) is None and SEGMENT.peek(x) is None
    SEGMENT.attach(x, 'a segment')
    assert SEGMENT.peek(x) == 'a segment' and SEGMENT.take(x) == 'a segment'
    assert SEGMENT.take(x) is None
    SEGMENT.attach(x, 'a segment')
    assert SEGMENT.peek(x.clone()) is None, 'another tensor'


def test_what_belongs_to_other_values_is_not_found():
    x = torch.ones(2)
    for carried in (SEGMENT, READ_AHEAD, IN_FLIGHT):
        carried.attach(x, 'of the ones')
    x.add_(1)
    assert SEGMENT.take(x) is None and READ_AHEAD.peek(x) is None
    assert IN_FLIGHT.take(x) == 'of the ones'


@pytest.mark.parametrize('changed', ['graph', 'mode', 'demand'])
def test_a_read_ahead_belongs_to_the_graph_that_it_was_made_in(changed):
    x = torch.ones(2) if changed == 'demand' else torch.ones(2, requires_grad=True) * 2
    READ_AHEAD.attach(x, 'ahead')
    assert READ_AHEAD.peek(x) == 'ahead'
    if changed == 'graph':
        x.detach_()
    elif changed == 'demand':
        x.requires_grad_()
    with torch.set_grad_enabled(changed != 'mode'):
        assert READ_AHEAD.take(x) is None


def test_a_config_has_what_was_attached():
    config = SimpleNamespace()
    assert RESIDUAL.peek(config) is None
    RESIDUAL.attach(config, 'mhc')
    assert config.residual_config == 'mhc' and RESIDUAL.peek(config) == 'mhc'


def bypasses(tree: ast.Module) -> list[int]:
    """Lines that write one of the attributes by its name, or read or write one of a tensor's."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            written = isinstance(node.ctx, ast.Store | ast.Del)
            found = node.attr in ON_TENSORS or written and node.attr in ON_CONFIGS
        elif isinstance(node, ast.Constant):
            # By setattr, getattr or __dict__.
            found = isinstance(node.value, str) and node.value in ON_TENSORS
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setattr':
            found = getattr(node.args[1], 'value', None) in ON_CONFIGS
        elif isinstance(node, ast.Subscript):
            written = isinstance(node.ctx, ast.Store | ast.Del)
            of_object = getattr(node.value, 'attr', '') == '__dict__'
            found = written and of_object and getattr(node.slice, 'value', None) in ON_CONFIGS
        else:
            continue
        if found:
            lines.append(node.lineno)
    return sorted(lines)


def attaching(tree: ast.Module) -> list[str]:
    """Constants of ``attached.py`` whose ``attach`` is called."""
    return [
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, 'attr', '') == 'attach'
        and getattr(node.func.value, 'id', '') in TENSOR
    ]


def sources() -> dict[str, ast.Module]:
    folders = ('kernels', 'schedules', 'megatron_mhc', 'patches')
    paths = (path for folder in folders for path in (ROOT / folder).rglob('*.py'))
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in paths
        if not any(parent.is_symlink() for parent in path.parents if parent != ROOT)
    }


def test_nobody_writes_past_the_module():
    found = [
        f'{name}:{line}'
        for name, tree in sources().items()
        if name not in HOMES
        for line in bypasses(tree)
    ]
    assert not found, f'use attach, take and peek of {HOMES}: {found}'


def test_each_is_attached_by_its_owner_alone():
    found = {(constant, name) for name, tree in sources().items() for constant in attaching(tree)}
    owners = {
        (constant, f'megatron_mhc/{value.owner.replace(".", "/")}.py')
        for constant, value in TENSOR.items()
    }
    assert found == owners


@pytest.mark.parametrize(
    'line',
    [
        'x.mhc_read_ahead = 1',
        'del x.mhc_segment',
        'y = x.mhc_next_pre',
        'x.__dict__["mhc_in_flight"] = 1',
        'x.__dict__.pop("mhc_dense_ways", None)',
        'setattr(x, "mhc_segment", 1)',
        'model.config.residual_config = 1',
        'setattr(config, "pipeline_config", 1)',
        'config.__dict__["engram_config"] = 1',
        'config.mhc_post_stream = 1',
    ],
)
def test_a_bypass_is_noticed(line):
    assert bypasses(ast.parse(f'import x\n{line}\n')) == [2]


def test_reading_a_setting_of_a_config_or_of_the_command_line_is_none():
    lines = 'residual_config = config.residual_config\nget("pipeline_config")\nargs.mhc_post_stream'
    assert not bypasses(ast.parse(lines))
