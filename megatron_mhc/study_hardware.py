"""GPUs and links of a scaling study, and what is assumed of how well they are used."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """One kind of machine: its spec sheet first, then assumptions (``STUDY.md`` has the reasons).

    Args:
        name: for people.
        tflops: dense bf16 TFLOP/s of a GPU.
        memory_gib: memory of a GPU that a process sees.
        memory_gb_s: GB/s of it, read and written together.
        nvlink_gb_s: GB/s between GPUs of a node, one way, per GPU.
        network_gb_s: the same between nodes.
        gpus_per_node: GPUs that NVLink joins.
        gemm_efficiency: share of ``tflops`` in linear layers, with the norms, activation functions,
            routing and permutations between them.
        attention_efficiency: share of ``tflops`` in the core of attention.
        kernel_efficiency: share of ``memory_gb_s`` in mHC kernels, residual additions, the loss and
            the optimizer.
        link_efficiency: share of a link's bandwidth.
        latency_us: until a message or collective begins to arrive.
        slot_overlap: share of the all-to-all that a fused slot can hide, and does.
        post_overlap: share of the MLPs' F_post,res that ``--mhc-post-stream high`` hides.

    Raises:
        ValueError: a value that no machine has.
    """

    name: str
    tflops: float
    memory_gib: float
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    gpus_per_node: int = 8
    gemm_efficiency: float = 0.55
    attention_efficiency: float = 0.5
    kernel_efficiency: float = 0.8
    link_efficiency: float = 0.8
    latency_us: float = 10.0
    slot_overlap: float = 1.0
    post_overlap: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == 'name':
                continue
            if not math.isfinite(value) or value < 0 or (not value and field.name not in _ZERO):
                raise ValueError(f'hardware {field.name}={value}: give a finite number above 0')
            if value > 1 and field.name.endswith(('efficiency', 'overlap')):
                raise ValueError(f'hardware {field.name}={value}: a share; give at most 1')

    @property
    def flops(self) -> float:
        """FLOP/s in linear layers."""
        return self.tflops * 1e12 * self.gemm_efficiency

    @property
    def attention_flops(self) -> float:
        """FLOP/s in the core of attention."""
        return self.tflops * 1e12 * self.attention_efficiency

    @property
    def bandwidth(self) -> float:
        """Bytes/s of memory in kernels that wait for it."""
        return self.memory_gb_s * 1e9 * self.kernel_efficiency

    @property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.memory_gib * 2**30


_ZERO = ('latency_us', 'slot_overlap', 'post_overlap')

# NVIDIA's data sheets of the SXM parts: products without sparsity, NVLink one way (half of what
# they print), one network adapter a GPU as in DGX systems; memory as CUDA reports it.
PRESETS = {
    'a100': Hardware('A100 80 GB', 312, 79, 2039, 300, 25),
    'h100': Hardware('H100', 989, 79, 3350, 450, 50),
    'h200': Hardware('H200', 989, 139, 4800, 450, 50),
    'b200': Hardware('B200', 2250, 178, 8000, 900, 50),
}


def hardware_of(name: str, changes: list[str] = ()) -> Hardware:
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
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise ValueError(f'{where}: {reason}; give a YAML file') from error
    except yaml.YAMLError as error:
        raise ValueError(f'{where}: not YAML: {" ".join(str(error).split())}') from error
    if not isinstance(found, dict):
        raise ValueError(f'{where}: wanted "field: value" lines of {_fields()}')
    values: dict[str, Any] = {'name': path.stem}
    preset = found.pop('preset', None)
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f'{where}: preset: {preset}: choose one of {", ".join(PRESETS)}')
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
    if field not in Hardware.__dataclass_fields__:
        raise ValueError(f'{where}: there is no field {field!r}; there are {_fields()}')


def _typed(field: str, value: Any, where: str) -> Any:
    """YAML takes 1e3 for text, and ``--set`` everything."""
    kind = {'str': str, 'int': int, 'float': float}[Hardware.__dataclass_fields__[field].type]
    try:
        if isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}: {field}={value!r}: wanted {kind.__name__}') from error
