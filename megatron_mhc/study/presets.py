"""Machines by name, or from a YAML file of somebody's own."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.values import shown
from megatron_mhc.settings.queues import BLACKWELL
from megatron_mhc.study.hardware import Hardware

# Digits of a number in a file or behind --set that is worth reading.
_DIGITS = 40

# NVIDIA's data sheets of the SXM parts: products without sparsity, NVLink one way (half of what
# they print), one network adapter a GPU as in DGX systems; memory as CUDA reports it.
#
# h800: an H100 with NVLink of 400 GB/s both ways (DeepSeek-V3, arXiv 2412.19437, counts on 160 of
# the 200 GB/s one way). gb200, gb300: the NVL72 sheets by 72, 360 PFLOP/s of bf16 and 720 of fp8
# with sparsity, 576 TB/s, 130 TB/s of NVLink; adapters of 400 and 800 Gb/s, 4 GPUs a tray. Of a
# rack's 72 GPUs 64 count as a node, since groups of powers of two would straddle two racks.
# From memory, not from a sheet: the GiB that CUDA reports on gb200 and gb300.
_NVL72 = Hardware(
    'GB200',
    *(2500, 184, 8000, 900, 50),
    gpus_per_node=64,
    gpus_per_host=4,
    fp32_tflops=80,
    fp8_tflops=5000,
    compute_capability=BLACKWELL,
)
PRESETS = {
    'a100': Hardware('A100 80 GB', 312, 79, 2039, 300, 25, fp32_tflops=19.5, compute_capability=8),
    'h800': Hardware('H800', 989, 79, 3350, 200, 50, fp32_tflops=67, fp8_tflops=1979),
    'h100': Hardware('H100', 989, 79, 3350, 450, 50, fp32_tflops=67, fp8_tflops=1979),
    'h200': Hardware('H200', 989, 139, 4800, 450, 50, fp32_tflops=67, fp8_tflops=1979),
    'b200': Hardware(
        'B200',
        *(2250, 178, 8000, 900, 50),
        fp32_tflops=75,
        fp8_tflops=4500,
        compute_capability=BLACKWELL,
    ),
    'gb200': _NVL72,
    'gb300': dataclasses.replace(_NVL72, name='GB300', memory_gib=276, network_gb_s=100),
}


def hardware_of(name: str, changes: Sequence[str] = ()) -> Hardware:
    """A preset by name or a machine from a YAML file, with fields changed.

    Args:
        name: of ``PRESETS``, or a file of ``field: value`` lines; ``preset: h100`` among them gives
            the fields that it leaves out.
        changes: ``field=value``.

    Raises:
        ValueError: no such preset or file, an unknown, missing or wrong field.
        RuntimeError: PyYAML is not installed.
    """
    where = f'--hardware {name}'
    if name in PRESETS:
        values = dataclasses.asdict(PRESETS[name])
    elif name.endswith(('.yaml', '.yml')):
        values = _read(Path(name), where)
    else:
        raise ValueError(f'{where}: choose {", ".join(PRESETS)} or a .yaml file')
    for change in changes:
        field, equals, value = change.partition('=')
        if not equals:
            raise ValueError(f'--set {change}: wanted FIELD=VALUE, such as gemm_efficiency=0.5')
        _known(field, f'--set {change}')
        values[field] = value
    return Hardware(**{field: _typed(field, value, where) for field, value in values.items()})


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f'{where}: reading YAML needs PyYAML, which is not installed; pip install pyyaml'
        ) from error
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, 'not a file')
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise ValueError(f'{where}: {reason}; give a YAML file') from error
    except yaml.YAMLError as error:
        raise ValueError(
            f'{where}: not YAML: {" ".join(str(error).split())}; give "field: value" lines'
        ) from error
    except (ValueError, RecursionError) as error:
        # Python reads no integer of thousands of digits, PyYAML no date of the 13th month.
        raise ValueError(f'{where}: a value that cannot be: {shown(str(error))}') from error
    if not isinstance(found, dict):
        raise ValueError(f'{where}: wanted "field: value" lines of {_fields()}')
    values: dict[str, Any] = {'name': path.stem}
    preset = found.pop('preset', None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(
                f'{where}: preset: {shown(preset)}: choose one of {", ".join(PRESETS)}'
            )
        values = dataclasses.asdict(PRESETS[preset]) | values
    for field in found:
        _known(field, where)
    values |= found
    missing = [
        field.name
        for field in dataclasses.fields(Hardware)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f'{where}: {missing[0]} is missing; add it, or preset: h100')
    return values


def _fields() -> str:
    return ', '.join(field.name for field in dataclasses.fields(Hardware))


def _known(field: str, where: str) -> None:
    if not isinstance(field, str) or field not in Hardware.__dataclass_fields__:
        raise ValueError(f'{where}: there is no field {shown(field)}; there are {_fields()}')


def _typed(field: str, value: Any, where: str) -> Any:
    """YAML takes 1e3 for text, and ``--set`` everything."""
    kind = {'str': str, 'int': int, 'float': float}[str(Hardware.__dataclass_fields__[field].type)]
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        if isinstance(value, str) and kind is not str and len(value) > _DIGITS:
            raise ValueError
        found = kind(value)
        # What int() would cut off.
        if isinstance(value, float) and found != value:
            raise ValueError
        return found
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f'{where}: {field}={shown(value)}: wanted {kind.__name__}') from error
