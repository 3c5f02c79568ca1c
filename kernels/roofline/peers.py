"""One sublayer of any implementation in the model: what one more of them adds to a chain.

Read, write and their backward are recorded for chains of two and of three sublayers; the difference
is a sublayer among others, with the sums of gradients that autograd makes. Where a kernel is tuned,
every configuration is predicted and the fastest one counts, which is what tuning would find if the
model were right. Torch kernels take their bytes at the speed of a copy and ``ENDS``; what a peer
reads again from L2 is not counted. Both favour the peers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.kernels.autograd.fused_edge import Read, Write, WriteRead
from megatron_mhc.kernels.autograd.ops import MappingSettings
from megatron_mhc.kernels.defaults import NORM_EPS
from megatron_mhc.kernels.offline import Resources, compile_launches
from megatron_mhc.kernels.peers.contender import Case, Contender
from megatron_mhc.kernels.peers.liger import Liger, LigerHalfPhi
from megatron_mhc.kernels.peers.megatron import Megatron
from megatron_mhc.kernels.peers.te import (
    TransformerEngine,
    TransformerEngineBuffer,
    TransformerEngineSplitK,
)
from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.launches import predict_launch
from megatron_mhc.kernels.roofline.loops import passes_of
from megatron_mhc.kernels.roofline.predict import ENDS, Prediction, Work
from megatron_mhc.kernels.roofline.profile import Section
from megatron_mhc.kernels.roofline.recording import (
    Recorded,
    Started,
    recording,
    tensor_bytes,
)
from megatron_mhc.kernels.shipped import ITERATIONS
from megatron_mhc.kernels.triton.launch import Launch

KINDS: tuple[type[Contender], ...] = (
    TransformerEngine,
    TransformerEngineSplitK,
    TransformerEngineBuffer,
    Liger,
    LigerHalfPhi,
    Megatron,
)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a sublayer at its fastest: how often it starts, and of how many configurations.

    ``failed`` of those did not compile or fit on an SM.
    """

    launch: Launch
    found: Resources
    prediction: Prediction
    times: int
    configurations: int
    failed: int


@dataclass(frozen=True)
class Eager:
    """Torch kernels of a sublayer: how many, their bytes, and their time in seconds."""

    count: int
    moved: int
    seconds: float


Meter = Callable[[int], AbstractContextManager[Callable[[int], object]]]


def sublayer_of(
    kind: type[Contender], case: Case, gpu: Gpu, meter: Meter
) -> tuple[list[Kernel], Eager]:
    """The kernels of one sublayer, forward and backward, in the model.

    Args:
        kind: a contender that is available and takes ``case``.
        meter: given how much there is to compile, it gives what is told of progress.

    Raises:
        ValueError: a kernel compiles in no configuration, or its loops are not understood.
    """
    started, eager = added(kind, case, gpu)
    forms = [form for one, _ in started for form in one.forms]
    pairs = [(form, gpu.arch) for form in forms]
    results = iter(compile_launches(pairs, gpus={gpu.arch: gpu}, load=kind.module))
    with meter(len(pairs)) as advance:
        found = [_fastest(one, times, results, gpu, advance) for one, times in started]
    return found, eager


class Ours(Contender):
    """Our kernels as the layers use them: read, write, and both in one at the fused edge."""

    name = 'triton'

    def streams(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def read(self, x: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        u, *state = Read.apply(x, *self._read_arguments(params))
        return u, state

    def write(self, y: Tensor, state: Any) -> Tensor:
        h_post, h_res, carried = state
        written: Tensor = Write.apply(carried, y.flatten(0, 1), h_post, h_res, None, 0.0, None)
        return written

    def write_read(
        self, y: Tensor, state: Any, params: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Any]:
        h_post, h_res, carried = state
        x_new, u, *state = WriteRead.apply(
            *(carried, y.flatten(0, 1), h_post, h_res, None, 0.0, None),
            *self._read_arguments(params),
        )
        return x_new, u, state

    def _read_arguments(self, params: tuple[Tensor, ...]) -> tuple[Any, ...]:
        weight, bias, alpha = params
        settings = MappingSettings(self.case.streams, ITERATIONS, NORM_EPS, 'auto')
        return weight, bias, settings, alpha


def eager_of(kind: type[Contender], case: Case, gpu: Gpu) -> Eager:
    """The torch kernels of one sublayer."""
    return added(kind, case, gpu)[1]


def foreign_work(launch: Launch, sections: Sequence[Section], resident: int) -> Work:
    """The ``Work`` of a launch of a kernel that nobody described: every tensor once, no L2.

    Raises:
        ValueError: its loops are not understood.
    """
    tensors = {
        (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape): tensor
        for tensor in launch.tensors
    }
    grid = 1
    for size in launch.grid:
        grid *= size
    return Work(
        grid=grid,
        warps=launch.options['num_warps'],
        resident=resident,
        dram_bytes=sum(map(tensor_bytes, tensors.values())),
        l2_bytes=0,
        passes=passes_of(launch, sections[1:]),
    )


def _fastest(
    one: Started,
    times: int,
    results: Iterator[Resources | RuntimeError],
    gpu: Gpu,
    advance: Callable[[int], object],
) -> Kernel:
    best: tuple[Prediction, Launch, Resources] | None = None
    reasons: list[str] = []
    for form, found in zip(one.forms, itertools.islice(results, len(one.forms)), strict=True):
        advance(1)
        if isinstance(found, RuntimeError):
            reasons.append(str(found))
            continue
        try:
            seen = predict_launch(form, found, gpu, foreign_work)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if best is None or seen.seconds < best[0].seconds:
            best = (seen, form, found)
    if best is None:
        raise ValueError(f'{reasons[0]} (of {len(one.forms)} configurations none can be predicted)')
    prediction, launch, found = best
    return Kernel(launch, found, prediction, times, len(one.forms), len(reasons))


def added(kind: type[Contender], case: Case, gpu: Gpu) -> tuple[list[tuple[Started, int]], Eager]:
    """What a third sublayer adds to two."""
    two, three = (_chain(kind, case, gpu, sublayers) for sublayers in (2, 3))
    known = {_key(one): one for one in three.kernels}
    counts = Counter(map(_key, three.kernels))
    counts.subtract(map(_key, two.kernels))
    operations = Counter(three.torch)
    operations.subtract(two.torch)
    started = [(known[key], counts[key]) for key in known if counts[key] > 0]
    kernels = list(operations.elements())
    moved = sum(kernel.moved for kernel in kernels)
    return started, Eager(len(kernels), moved, moved / gpu.copy + len(kernels) * ENDS)


def _key(one: Started) -> tuple[object, ...]:
    launch = one.forms[0]
    shapes = [(tuple(t.shape), t.dtype) for t in launch.tensors]
    return (launch.name, launch.grid, *launch.constants.items(), *shapes)


def _chain(kind: type[Contender], case: Case, gpu: Gpu, sublayers: int) -> Recorded:
    """So many sublayers with their backward, the sublayers themselves left out."""
    contender = kind(case, 'meta')
    n, width = case.streams, case.hidden

    def streams(size: int) -> Tensor:
        return torch.empty(case.tokens, 1, size, dtype=case.torch_dtype, device='meta')

    def parameters() -> tuple[Tensor, ...]:
        shapes = ((case.maps, n * width), (case.maps,), (3,))
        ours = (torch.empty(shape, device='meta') for shape in shapes)
        return tuple(map(_leaf, contender.params(*ours)))

    x = _leaf(contender.streams(streams(n * width)))
    ys = [_leaf(streams(width)) for _ in range(sublayers)]
    params = [parameters() for _ in range(sublayers)]
    with recording(gpu) as seen:
        u, state = contender.read(x, params[0])
        outputs = [u]
        for y, following in zip(ys, params[1:], strict=False):
            _, u, state = contender.write_read(y, state, following)
            outputs.append(u)
        outputs.append(contender.write(ys[-1], state))
        # Not into .grad, where copies of the test's own would be counted.
        inputs = [x, *ys, *itertools.chain.from_iterable(params)]
        arriving = [torch.empty_like(output) for output in outputs]
        torch.autograd.grad(outputs, inputs, arriving, allow_unused=True)
    return seen


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_()


def as_fields(kernels: list[Kernel], eager: Eager, gpu: Gpu) -> dict[str, Any]:
    """A sublayer as plain values; microseconds, and megabytes of 10^6 bytes."""
    rows = [
        {
            'kernel': kernel.launch.name,
            'times': kernel.times,
            'configurations': kernel.configurations,
            'failed': kernel.failed,
            'chosen': _chosen(kernel),
            'spill_bytes': kernel.found.spill_bytes or kernel.found.stack_bytes,
            'microseconds': round(1e6 * kernel.prediction.seconds, 1),
            'copy_percent': round(kernel.prediction.copy_percent, 1),
            'bound': kernel.prediction.bound,
        }
        for kernel in kernels
    ]
    seconds = eager.seconds + sum(k.times * k.prediction.seconds for k in kernels)
    moved = sum(k.times * k.prediction.bounds['dram'] for k in kernels) * gpu.copy + eager.moved
    return {
        'kernels': rows,
        'torch_kernels': eager.count,
        'torch_us': 1e6 * eager.seconds,
        'megabytes': moved / 1e6,
        'predicted_us': 1e6 * seconds,
        'copy_percent': 100 * moved / gpu.copy / seconds,
        'spilling': sorted({row['kernel'] for row in rows if row['spill_bytes']}),
    }


def _chosen(kernel: Kernel) -> str:
    """What tuning would choose; empty where nothing is tuned."""
    if kernel.configurations == 1:
        return ''
    launch = kernel.launch
    blocks = {name: value for name, value in launch.constants.items() if _is_block(name, value)}
    return ' '.join(f'{name}={value}' for name, value in (blocks | launch.options).items())


def _is_block(name: str, value: object) -> bool:
    return name.startswith(('BLOCK', 'STEP')) and isinstance(value, int)
