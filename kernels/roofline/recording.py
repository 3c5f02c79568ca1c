"""What any code starts on a GPU, seen without one: Triton launches of any project, torch kernels.

The code runs on meta tensors, forward and backward. Launches are kept instead of run, an autotuned
kernel's with all configurations that are left after its own pruning; torch kernels are counted by
the bytes that they read and write. Triton's driver and torch.cuda are stood in for by a GPU of
``gpus``, where there is a real one too.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.triton.launch import Launch
from megatron_mhc.kernels.verdict import MULTIPROCESSORS, WARP

# What Triton launches with where nobody says otherwise.
NUM_WARPS, NUM_STAGES = 4, 3
# They write without reading what they write to.
FILLS = frozenset('copy_ zero_ fill_ normal_ uniform_'.split())


@dataclass(frozen=True)
class TorchKernel:
    """One kernel of torch's: its name, and the bytes that it reads and writes."""

    name: str
    moved: int


@dataclass(frozen=True)
class Started:
    """A Triton kernel that was started: a ``Launch`` for each configuration it may be tuned to."""

    forms: tuple[Launch, ...]


@dataclass
class Recorded:
    """In the order of their start."""

    kernels: list[Started] = field(default_factory=list)
    torch: list[TorchKernel] = field(default_factory=list)


@contextlib.contextmanager
def recording(gpu: Gpu) -> Iterator[Recorded]:
    """Collect what is started instead of running it, as on ``gpu``.

    ``torch.compile`` compiles nothing inside: its functions are seen op by op.
    """
    seen = Recorded()

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        seen.kernels.append(Started((_launch(self, args, kwargs, grid),)))

    def tuned(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        forms = (_launch(self.fn, args, kwargs | config.all_kwargs(), grid) for config in configs)
        seen.kernels.append(Started(tuple(forms)))

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (JITFunction, 'run', run),
            (Autotuner, 'run', tuned),
            (driver, '_active', _driver(gpu)),
            (torch.cuda, 'is_available', lambda: True),
            (torch.cuda, 'get_device_capability', lambda device=None: divmod(gpu.arch, 10)),
            (torch.cuda, 'get_device_properties', lambda device=None: _properties(gpu)),
        ):
            stack.enter_context(_standing_in(owner, name, stand_in))
        # Whoever used torch.compile has imported this, which takes seconds.
        if 'torch._dynamo' in sys.modules:
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        stack.enter_context(_TorchKernels(seen.torch))
        yield seen


@contextlib.contextmanager
def _standing_in(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _properties(gpu: Gpu) -> SimpleNamespace:
    major, minor = divmod(gpu.arch, 10)
    return SimpleNamespace(
        name=gpu.title, major=major, minor=minor, multi_processor_count=gpu.sms, warp_size=WARP
    )


def _driver(gpu: Gpu) -> SimpleNamespace:
    """What wrappers and pruning ask of Triton's driver."""
    limits = MULTIPROCESSORS[gpu.arch]
    properties = {
        'max_shared_mem': limits.block_bytes,
        'max_num_regs': limits.registers,
        'multiprocessor_count': gpu.sms,
        'warpSize': WARP,
    }
    return SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda index: properties),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget('cuda', gpu.arch, WARP),
    )


def _launch(function: Any, args: Sequence[Any], named: Mapping[str, Any], grid: Any) -> Launch:
    """The launch of a ``triton.jit`` function, maybe under heuristics."""
    heuristics: dict[str, Callable[[dict[str, Any]], Any]] = {}
    while not isinstance(function, JITFunction):
        if isinstance(function, Heuristics):
            heuristics |= function.values
        function = function.fn
    bound = dict(zip(function.arg_names, args, strict=False)) | dict(named)
    for name, choose in heuristics.items():
        bound[name] = choose(bound)
    size = grid(bound) if callable(grid) else grid
    options = {'num_warps': NUM_WARPS, 'num_stages': NUM_STAGES}
    options |= {
        name: value
        for name, value in bound.items()
        if name not in function.arg_names and isinstance(value, int) and name != 'debug'
    }
    constants, run_time = {}, []
    for parameter in function.params:
        value = bound.get(parameter.name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr:
            constants[parameter.name] = value
        else:
            run_time.append(value)
    return Launch(function, tuple(map(int, size)), tuple(run_time), constants, options)


class _TorchKernels(TorchDispatchMode):
    """Appends a ``TorchKernel`` for every operation that computes or copies."""

    def __init__(self, seen: list[TorchKernel]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        places = {tensor.untyped_storage()._cdata for tensor in given}
        view = all(tensor.untyped_storage()._cdata in places for tensor in made)
        if 'empty' in name or (view and not func._schema.is_mutable):
            return result
        read = given[1:] if name in FILLS else given
        self.seen.append(TorchKernel(name, sum(map(tensor_bytes, [*read, *made]))))
        return result


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory of a tensor: what a stride of 0 repeats counts once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride) * tensor.element_size()
