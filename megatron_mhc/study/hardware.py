"""GPUs and links of a scaling study, and what is assumed of how well they are used."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.values import shown


@dataclass(frozen=True)
class Hardware:
    """One kind of machine: its spec sheet first, then assumptions (reasons: ``docs/study.md``).

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
        fp32_tflops: of matrix products of a model that is trained in fp32; 0 where unknown.
        compute_capability: its major number, 10 for Blackwell: see ``one_queue``.

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
    fp32_tflops: float = 0.0
    compute_capability: int = 9

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == 'name':
                continue
            if abs(value) > _LARGEST:
                raise ValueError(f'hardware {field.name}: no machine has more than {_LARGEST:g}')
            if not math.isfinite(value) or value < 0 or (not value and field.name not in _ZERO):
                raise ValueError(f'hardware {field.name}={value}: give a finite number above 0')
            if value > 1 and field.name.endswith(('efficiency', 'overlap')):
                raise ValueError(f'hardware {field.name}={value}: a share; give at most 1')

    def peak(self, value_bytes: int = 2) -> float:
        """FLOP/s of a GPU with values of 2 bytes (bf16, fp16) or 4 (fp32).

        Raises:
            ValueError: fp32, and ``fp32_tflops`` is not known.
        """
        if value_bytes == 2:
            return self.tflops * 1e12
        if not self.fp32_tflops:
            raise ValueError(
                'hardware fp32_tflops=0: unknown, but the model is fp32; add --bf16 behind '
                '--model, or --set fp32_tflops=67 (an H100)'
            )
        return self.fp32_tflops * 1e12

    def one_queue(self, tp: int, cp: int = 1) -> bool:
        """Whether all streams of a GPU share one hardware queue, and do not overlap.

        Megatron 0.17 to 0.19 (and main) ends a run with tensor or context parallelism unless
        ``CUDA_DEVICE_MAX_CONNECTIONS`` is 1, on GPUs before Blackwell.
        """
        return (tp > 1 or cp > 1) and self.compute_capability < BLACKWELL

    @property
    def bandwidth(self) -> float:
        """Bytes/s of memory in kernels that wait for it."""
        return self.memory_gb_s * 1e9 * self.kernel_efficiency

    @property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.memory_gib * 2**30


# Major number of its compute capability.
BLACKWELL = 10
_ZERO = ('latency_us', 'slot_overlap', 'post_overlap', 'fp32_tflops')
_LARGEST = 1e30
# Digits of a number in a file or behind --set that is worth reading.
_DIGITS = 40

# NVIDIA's data sheets of the SXM parts: products without sparsity, NVLink one way (half of what
# they print), one network adapter a GPU as in DGX systems; memory as CUDA reports it.
PRESETS = {
    'a100': Hardware('A100 80 GB', 312, 79, 2039, 300, 25, fp32_tflops=19.5, compute_capability=8),
    'h100': Hardware('H100', 989, 79, 3350, 450, 50, fp32_tflops=67),
    'h200': Hardware('H200', 989, 139, 4800, 450, 50, fp32_tflops=67),
    'b200': Hardware(
        'B200', 2250, 178, 8000, 900, 50, fp32_tflops=75, compute_capability=BLACKWELL
    ),
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
