"""Compile recorded launches for any NVIDIA GPU without one, and read what the machine code needs.

Triton compiles for a target it is told, and its wheel holds the assembler and the disassembler, so
neither a GPU nor a driver takes part. Speed and numerics are not visible here; spills, registers,
shared memory, the width of memory accesses and the matrix instructions are.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron_mhc.kernels.defaults import DIVISOR
from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.profile import Section, profile
from megatron_mhc.kernels.traffic import arguments
from megatron_mhc.kernels.triton.alignment import excess_bytes
from megatron_mhc.kernels.triton.launch import Launch, interpreted

POINTERS = {
    torch.bfloat16: '*bf16',
    torch.float16: '*fp16',
    torch.float32: '*fp32',
    torch.float64: '*fp64',
    torch.int32: '*i32',
    torch.int64: '*i64',
}
ALIGNED: list[list[str | int]] = [['tt.divisibility', 16]]
WARP = 32


@dataclass(frozen=True)
class Job:
    """A launch as the compiler sees it, in plain values that another process can be sent.

    ``load`` gives the module of that name; it is a function at the top of another one.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int], object]
    attributes: dict[tuple[int], list[list[str | int]]]
    options: dict[str, int]
    arch: int
    gpu: Gpu | None = None
    load: Callable[[str], ModuleType] = importlib.import_module


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    ``registers`` are per thread, ``shared_bytes`` per block; ``stack_bytes`` and ``spill_bytes``
    (spill stores and loads as they stand in the code) per thread. ``loads``, ``copies`` (to shared
    memory) and ``stores`` count global accesses by their width in bits. ``narrowest`` is the
    narrowest access in bits to the tensor of each pointer parameter. ``mma`` names the matrix
    instructions, or is ``-``. ``tensor_columns`` is what a block takes of the 512 columns of tensor
    memory that an SM of Blackwell has. ``profile`` is what the model of ``roofline`` keeps of the
    code, where it was asked for.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loads: dict[int, int]
    copies: dict[int, int]
    stores: dict[int, int]
    narrowest: dict[str, int]
    mma: str
    tensor_columns: int
    profile: tuple[Section, ...] | None = None


def require_compiler() -> None:
    """Raise RuntimeError where Triton interprets kernels, or lacks a tool that reads them."""
    if interpreted():
        value = os.environ.get('TRITON_INTERPRET', '1')
        raise RuntimeError(
            f'TRITON_INTERPRET={value}: Triton interprets kernels and compiles none; '
            'unset TRITON_INTERPRET and start again'
        )
    for tool in ('cuobjdump', 'nvdisasm'):
        try:
            getattr(triton.knobs.nvidia, tool).path  # noqa: B018  it looks for the file
        except RuntimeError:
            raise RuntimeError(
                f'Triton {triton.__version__} finds no {tool}, which its wheel brings in '
                f'triton/backends/nvidia/bin: install triton from PyPI, or name the one of a CUDA '
                f'toolkit in TRITON_{tool.upper()}_PATH'
            ) from None


def compile_launches(
    pairs: Iterable[tuple[Launch, int]],
    workers: int | None = None,
    gpus: Mapping[int, Gpu] | None = None,
    load: Callable[[str], ModuleType] = importlib.import_module,
) -> Iterator[Resources | RuntimeError]:
    """Compile launches in parallel processes and read what they take.

    Args:
        pairs: launch and compute capability, 90 for sm_90.
        workers: processes; one for each CPU that this process may use when None.
        gpus: compute capability -> the GPU for which its kernels get a ``profile``; none when None.
        load: how a process gets the module of a kernel by its name; see ``Job``.

    Yields:
        In the order of ``pairs``, resources or the error that took their place.
    """
    require_compiler()
    gpus = gpus or {}
    jobs = [_job(launch, arch, gpus.get(arch), load) for launch, arch in pairs]
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        yield from map(_attempt, jobs)
        return
    # Spawned, because a fork of a process that has started torch's threads may hang.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_attempt, jobs)


def specialization(value: torch.Tensor | float | None) -> tuple[str, bool]:
    """``(type, divisible by 16)`` of an argument as Triton's launcher specialises it.

    The type is ``constexpr`` for a value which the launcher compiles in: None and the integer 1.
    """
    if value is None:
        return 'constexpr', False
    if isinstance(value, torch.Tensor):
        # Allocators align to more than this; a view that starts elsewhere compiles to other code.
        return POINTERS[value.dtype], excess_bytes(value) == 0
    if isinstance(value, bool):
        return 'u1', False
    if isinstance(value, float):
        return 'fp32', False
    if value == 1:
        return 'constexpr', False
    return 'i32' if -(2**31) <= value < 2**31 else 'i64', value % DIVISOR == 0


def _job(
    launch: Launch,
    arch: int,
    gpu: Gpu | None = None,
    load: Callable[[str], ModuleType] = importlib.import_module,
) -> Job:
    run_time = arguments(launch)
    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list[list[str | int]]] = {}
    for index, name in enumerate(inspect.signature(launch.kernel.fn).parameters):
        signature[name], aligned = 'constexpr', False
        if name in run_time:
            signature[name], aligned = specialization(run_time[name])
        if signature[name] == 'constexpr':
            constants[(index,)] = run_time.get(name, launch.constants.get(name))
        elif aligned and not launch.kernel.params[index].do_not_specialize_on_alignment:
            attributes[(index,)] = ALIGNED
    fn = launch.kernel.fn
    known = (signature, constants, attributes, launch.options)
    return Job(fn.__module__, fn.__name__, *known, arch, gpu, load)


def _attempt(job: Job) -> Resources | RuntimeError:
    try:
        return _compile(job)
    except RuntimeError as error:
        return error


def _compile(job: Job) -> Resources:
    kernel = getattr(job.load(job.module), job.kernel)
    while not isinstance(kernel, JITFunction):
        # What tunes it, or chooses its constants: the job has one choice.
        kernel = kernel.fn
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    target = GPUTarget('cuda', job.arch, WARP)
    try:
        # Triton prints a failure of its assembler; standard output belongs to the caller.
        with contextlib.redirect_stdout(sys.stderr):
            compiled = triton.compile(source, target=target, options=dict(job.options))
    except Exception as error:  # the compiler has no common base class of its errors
        lines = [line for line in str(error).splitlines() if line.strip()] or ['']
        raise RuntimeError(
            f'{job.kernel} does not compile for sm_{job.arch} with Triton {triton.__version__}: '
            f'{type(error).__name__}: {lines[-1].strip()}'
        ) from None
    usage, sass = _disassemble(compiled.asm['cubin'])
    ptx = compiled.asm['ptx']
    instructions = Counter(SASS.findall(sass))
    spills = (_widths(instructions, name) for name in ('STL', 'LDL'))
    return Resources(
        registers=_usage(usage, 'REG'),
        stack_bytes=_usage(usage, 'STACK'),
        spill_bytes=sum(bits // 8 * count for widths in spills for bits, count in widths.items()),
        shared_bytes=compiled.metadata.shared,
        instructions=instructions.total() - instructions['NOP'],
        loads=_widths(instructions, 'LDG'),
        copies=_widths(instructions, 'LDGSTS'),
        stores=_widths(instructions, 'STG'),
        narrowest=_narrowest(ptx, [n for n, kind in job.signature.items() if kind != 'constexpr']),
        mma=' '.join(sorted({f'{unit}.{kind}' for unit, kind in MMA.findall(ptx)})) or '-',
        tensor_columns=getattr(compiled.metadata, 'tmem_size', 0) or 0,
        profile=profile(sass, job.gpu) if job.gpu else None,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        # Warnings of a working disassembler say nothing about the kernel.
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tools.cuobjdump.path, '-res-usage', file.name]).stdout
        return usage, run([tools.nvdisasm.path, '-c', file.name]).stdout


def _usage(text: str, name: str) -> int:
    """A figure of ``cuobjdump -res-usage``."""
    found = re.search(rf'{name}:(\d+)', text)
    if found is None:
        raise RuntimeError(
            f'cuobjdump -res-usage does not say {name}; take the cuobjdump that Triton brings'
        )
    return int(found.group(1))


# An instruction after its address and guard: /*0070*/ @!P0 LDG.E.128 R4, ...
SASS = re.compile(r'^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)', re.MULTILINE)
WIDTHS = {'U8': 8, 'S8': 8, 'U16': 16, 'S16': 16, '64': 64, '128': 128, '256': 256}


def _widths(instructions: Counter[str], name: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for instruction, count in instructions.items():
        head, *modifiers = instruction.split('.')
        if head == name:
            widths[next((WIDTHS[m] for m in modifiers if m in WIDTHS), 32)] += count
    return dict(sorted(widths.items()))


# mma and wgmma name the type of their operands behind the shape, tcgen05 a kind (f16 takes bf16).
MMA = re.compile(r'\b(mma|wgmma|tcgen05)\.\S*(?:m\d+n\d+k\d+(?:\.row\.col)?\.\w+\.|\.kind::)(\w+)')
# The width of an access in bits is a vector length times an element, or for cp.async a byte count.
ACCESS = re.compile(
    r'\b(?:ld|st)\.global\S*?(?:\.v(?P<count>\d))?\.[a-z](?P<bits>\d+)\s[^;]*?\[\s*(?P<at>%rd\d+)'
    r'|\bcp\.async\.\S+\s+\[[^]]*\],\s*\[\s*(?P<source>%rd\d+)[^]]*\],\s*(?P<bytes>\w+)'
)
# A 64-bit register, the instruction that defines it, and what it is computed from.
DEFINITION = re.compile(r'^\s*(?:@\S+\s+)?([\w.:]+)\s+(%rd\d+),(.*);', re.MULTILINE)
PARAMETER = re.compile(r'_param_(\d+)\]')


def _narrowest(ptx: str, parameters: list[str]) -> dict[str, int]:
    """The narrowest global access through each pointer: addresses are traced to parameters."""
    sources: dict[str, set[str]] = {}
    for instruction, register, rest in DEFINITION.findall(ptx):
        # A value read from memory is no address: kernels take no pointers to pointers.
        if instruction.startswith('ld.param'):
            sources.setdefault(register, set()).update(PARAMETER.findall(rest))
        elif not instruction.startswith('ld.'):
            sources.setdefault(register, set()).update(re.findall(r'%rd\d+', rest))
    pointers = {index for index, name in enumerate(parameters) if name.endswith('_ptr')}
    narrowest: dict[str, int] = {}
    for access in ACCESS.finditer(ptx):
        seen: set[str] = set()
        front = {access['at'] or access['source']}
        while front:
            seen |= front
            front = set().union(*(sources.get(register, ()) for register in front)) - seen
        found = {int(index) for index in seen if index.isdigit()} & pointers
        name = parameters[found.pop()] if len(found) == 1 else '?'
        if access['bytes']:
            bits = 8 * int(access['bytes'], 0)
        else:
            bits = int(access['count'] or 1) * int(access['bits'])
        narrowest[name] = min(bits, narrowest.get(name, bits))
    return narrowest
