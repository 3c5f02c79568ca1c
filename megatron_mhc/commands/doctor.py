"""``megatron-mhc doctor``: what is installed, and whether every patch fits, without training."""

from __future__ import annotations

import argparse
import json
import pathlib

import megatron_mhc
from megatron_mhc.compat import (
    CORE_SPECIFIER,
    TESTED,
    describe_core,
    require_supported_core,
    untested,
)
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.runtime.script_path import enter_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OPTIONAL = {'triton': 'triton', 'transformer-engine': 'transformer_engine', 'apex': 'apex'}


def report() -> dict[str, Any]:
    """Versions, device, optional packages and patches, as plain values."""
    import platform

    import torch

    try:
        require_supported_core()
        problem = None
    except RuntimeError as error:
        problem = str(error)
    optional = {name: _optional(name, module) for name, module in OPTIONAL.items()}
    broken = [name for name, state in optional.items() if state.startswith('BROKEN')]
    if broken and problem is None:
        problem = f'Megatron imports {" and ".join(broken)}, which cannot be imported'
    tested = ', '.join(f'{version} ({how})' for version, how in TESTED.items())
    return {
        'megatron-mhc': f'{megatron_mhc.__version__} ({_package_folder()})',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'megatron-core': _core(),
        'supported': f'{CORE_SPECIFIER}, tested: {tested}',
        # Nothing is refused for it: what runs may well be right, but nobody has looked.
        'untested': '; '.join(untested()) or None,
        'device': _device(),
        'kernels': _kernels(),
        'optional': optional,
        'problem': problem,
        'patches': [] if problem else _patches(),
    }


def _package_folder() -> pathlib.Path:
    """Which copy is in use: a checkout on the path wins over an installed wheel."""
    return pathlib.Path(megatron_mhc.__file__).parent


def _core() -> str:
    try:
        return describe_core().removeprefix('megatron-core ').removeprefix('is ')
    except RuntimeError as error:
        return f'BROKEN: {error}'


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return 'no CUDA; the launcher emulates a CUDA device on the CPU'
    major, minor = torch.cuda.get_device_capability()
    return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (sm_{major}{minor})'


def _kernels() -> str:
    """Whether ``--mhc-kernel-backend auto`` takes the Triton kernels here, for bf16 streams."""
    import torch

    from megatron_mhc.kernels.backend import kernel_obstacle

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    obstacle = kernel_obstacle(device, torch.bfloat16, 4)
    if device.type == 'cpu':
        return f'torch reference: {obstacle or "the kernels are interpreted on demand only"}'
    return f'torch reference: {obstacle}' if obstacle else 'Triton'


def _optional(name: str, module: str) -> str:
    import importlib.metadata

    if importlib.util.find_spec(module) is None:
        return 'not installed'
    try:
        importlib.import_module(module)
    except Exception as error:  # a half-installed package raises anything, and breaks Megatron too
        return f'BROKEN: {type(error).__name__}: {str(error).splitlines()[0]}; uninstall or repair'
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'present'


def _patches() -> list[dict[str, Any]]:
    import warnings

    warnings.simplefilter('ignore')  # Megatron warns of every optional package it does not find
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.patches.engine import inspect_patch
    from megatron_mhc.patches.registry import ALL_PATCHES

    rows = []
    for use, patches in (('residual', ALL_PATCHES), ('cpu device', CPU_DEVICE_PATCHES)):
        for patch in patches:
            state, detail = inspect_patch(patch)
            rows.append(
                {
                    'id': patch.id,
                    'use': use,
                    'state': state,
                    'detail': detail,
                    'target': patch.target,
                    'reason': patch.reason,
                }
            )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-mhc doctor``."""
    parser.add_argument(
        'script',
        metavar='SCRIPT',
        nargs='?',
        type=pathlib.Path,
        help='the pretrain script to be run, or its folder: Python looks there for Megatron first '
        '(default: in the current folder, if it holds megatron/core)',
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    parser.add_argument(
        '--refusals',
        action='store_true',
        help='list every combination of flags that is refused, why, and what to use instead',
    )
    parser.set_defaults(answer=__name__)


def refusals() -> list[dict[str, Any]]:
    """Every refused combination, as plain values."""
    from megatron_mhc.settings.refusals import REFUSALS

    return [
        {
            'flag': row.flag,
            'beside': table.feature.format('|'.join(table.values)),
            'reason': row.reason,
            'remedy': row.remedy,
            'otherwise': table.otherwise,
        }
        for table in REFUSALS
        for row in table.rows
    ]


def _print_refusals() -> None:
    beside = None
    for row in refusals():
        if row['beside'] != beside:
            beside = row['beside']
            print(f'{beside} (or {row["otherwise"]})')
        print(f'  {row["flag"]}\n    {row["reason"]}; {row["remedy"]}')


def main(options: argparse.Namespace) -> int:
    """Print the report; 1 when something needs a remedy, else 0."""
    if options.refusals:
        if options.json:
            print(json.dumps(refusals(), indent=2))
        else:
            _print_refusals()
        return 0
    if options.script is not None:
        if not options.script.exists():
            refuse(
                'megatron-mhc doctor',
                f'SCRIPT {options.script}: no such file or folder; name the script to run',
            )
        script = options.script.resolve()
        enter_folder(script if script.is_dir() else script.parent)
    found = report()
    broken = [row for row in found['patches'] if row['state'] in ('missing', 'unknown')]
    if options.json:
        print(json.dumps(found, indent=2))
        return int(bool(found['problem'] or broken))
    values = found | found['optional'] | {'problem': None}
    print(*table(row for row in values.items() if isinstance(row[1], str)), sep='\n')
    if found['problem']:
        print(f'\nproblem: {found["problem"]}')
        return 1
    print('\npatches (none is applied before a run asks for it)')
    rows = found['patches']
    lines = table([row[key] for key in ('id', 'state', 'use', 'target')] for row in rows)
    for line, row in zip(lines, rows, strict=True):
        print(f'  {line}')
        if row in broken:
            print(f'    {row["detail"]}; or install a tested megatron-core')
    return int(bool(broken))
