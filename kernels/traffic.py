"""What each op has to read and write, by formula: the paper's table and our kernels.

Streams count in C-wide vectors per token, maps in fp32 values per token; weights, biases and other
tensors without a token axis are not counted. mHC, Table 2 is the source of ``paper_forms``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mhc.kernels.triton.launch import Launch

STREAMS = ('x_ptr', 'y_ptr', 'u_ptr', 'out_ptr', 'g_ptr', 'dx_ptr', 'dy_ptr', 'du_ptr')
PARAMETERS = (
    *('weight_ptr', 'high_ptr', 'low_ptr', 'bias_ptr', 'seed_ptr'),
    *('a_pre_ptr', 'a_post_ptr', 'a_res_ptr', 'dweight_ptr', 'sums_ptr'),
)
# Constants that change what a kernel reads or writes.
VARIANTS = ('MIX', 'HAS_G', 'HAS_U', 'WRITE_DX')


@dataclass(frozen=True)
class Traffic:
    """Per token: C-wide vectors of the streams read and written, and the same of map values."""

    reads: int = 0
    writes: int = 0
    map_reads: int = 0
    map_writes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.reads + other.reads,
            self.writes + other.writes,
            self.map_reads + other.map_reads,
            self.map_writes + other.map_writes,
        )

    @property
    def elements(self) -> int:
        """C-wide vectors moved per token."""
        return self.reads + self.writes

    def bytes(self, tokens: int, channels: int, itemsize: int) -> int:
        """Bytes of T tokens of width C; ``itemsize`` is that of a stream's element."""
        streams = self.elements * channels * itemsize
        return tokens * (streams + 4 * (self.map_reads + self.map_writes))


def paper_forms(n: int) -> dict[str, Traffic]:
    """mHC, Table 2: a plain residual, and HC's steps one by one with their sum."""
    m = n * n + 2 * n
    steps = {
        'HC: maps': Traffic(n, 0, 0, m),
        'HC: H_pre': Traffic(n, 1, n, 0),
        'HC: H_post': Traffic(1, n, n, 0),
        'HC: H_res': Traffic(n, n, n * n, 0),
        'HC: merge': Traffic(2 * n, n),
    }
    return {'plain residual': Traffic(2, 1), **steps, 'HC: total': sum(steps.values(), Traffic())}


def our_forms(n: int) -> dict[str, Traffic]:
    """Sums over our kernels for one sublayer, with a projection neither split nor padded."""
    kernels = kernel_forms(n)
    pre, read = kernels['pre_forward'], kernels['maps_forward HAS_U']
    mapping = kernels['projection'] + kernels['maps_forward']
    post_res = kernels['post_res_forward']
    post_res_dx, pre_dx = kernels['post_res_backward WRITE_DX'], kernels['pre_backward']
    mapping_dx = kernels['maps_backward'] + kernels['read_backward']
    return {
        'mapping': mapping,
        'F_pre': pre,
        'F_post,res': post_res,
        'forward in three passes': mapping + pre + post_res,
        'forward at the fused edge': kernels['projection MIX'] + read,
        'mapping backward': mapping_dx,
        'F_pre backward': pre_dx,
        'F_post,res backward': post_res_dx,
        # Autograd adds the three dx one after the other.
        'backward op by op': mapping_dx + pre_dx + post_res_dx + Traffic(4 * n, 2 * n),
        'backward at the fused edge': kernels['post_res_backward']
        + kernels['maps_backward HAS_U']
        + kernels['read_backward HAS_G HAS_U'],
    }


def kernel_forms(n: int, splits: int = 1, columns: int | None = None) -> dict[str, Traffic]:
    """Each kernel, by its name and the constants in ``VARIANTS``.

    ``splits`` is how often the projection splits the channels, ``columns`` how many it stores
    (n*n + 2n when None).
    """
    m, square = n * n + 2 * n, n * n
    columns = columns or m
    partial = splits * (columns + 1)
    return {
        'pack': Traffic(),
        'projection': Traffic(n, 0, 0, partial),
        'projection MIX': Traffic(n + 1, n, n + square, partial),
        'maps_forward': Traffic(0, 0, partial, 2 * m + 1),
        'maps_forward HAS_U': Traffic(n, 1, partial, 2 * m + 1 - n),
        'pre_forward': Traffic(n, 1, n, 0),
        'post_res_forward': Traffic(n + 1, n, n + square, 0),
        'sinkhorn_forward': Traffic(0, 0, square, square),
        'post_res_backward': Traffic(2 * n + 1, 1, n, n + square),
        'post_res_backward WRITE_DX': Traffic(2 * n + 1, n + 1, n + square, n + square),
        'pre_backward': Traffic(n + 1, n, n, n),
        'maps_backward': Traffic(0, 0, 2 * m + 1, columns + 2),
        'maps_backward HAS_U': Traffic(n + 1, 0, 2 * m + 1 - n, n + columns + 2),
        'read_backward': Traffic(n, n, columns + 2, 0),
        'read_backward HAS_U': Traffic(n + 1, n, columns + 2 + n, 0),
        'read_backward HAS_G HAS_U': Traffic(2 * n + 1, n, columns + 2 + n + square, 0),
        'sinkhorn_backward': Traffic(0, 0, 2 * square, square),
    }


def variant(launch: Launch) -> str:
    """The key of a launch in ``kernel_forms``."""
    flags = [name for name in VARIANTS if launch.constants.get(name)]
    return ' '.join([launch.name.removesuffix('_kernel'), *flags])


def launch_traffic(launch: Launch) -> Traffic:
    """What ``kernel_forms`` says of a recorded launch."""
    constants, partial = launch.constants, arguments(launch).get('partial_ptr')
    splits = 1 if partial is None else partial.shape[0]
    return kernel_forms(constants['N'], splits, constants.get('MP'))[variant(launch)]


def launch_bytes_by_kind(launch: Launch) -> dict[str, int]:
    """Bytes of ``streams``, ``maps`` (any token axis) and ``parameters``, each moved once."""
    kinds = dict.fromkeys(('streams', 'maps', 'parameters'), 0)
    streams = stream_names(launch)
    for name, value in arguments(launch).items():
        if hasattr(value, 'element_size'):
            kind = 'streams' if name in streams else 'parameters' if name in PARAMETERS else 'maps'
            kinds[kind] += value.numel() * value.element_size()
    return kinds


def stream_names(launch: Launch) -> list[str]:
    """Kernel parameters that hold streams, or single C-wide vectors, of every token."""
    found = ((name, value) for name, value in arguments(launch).items() if name in STREAMS)
    return [name for name, value in found if getattr(value, 'ndim', 0) == 2]


def arguments(launch: Launch) -> dict[str, Any]:
    """Run-time arguments of a launch by the names of the kernel's parameters."""
    parameters = inspect.signature(launch.kernel.fn).parameters
    names = (name for name in parameters if name not in launch.constants)
    return dict(zip(names, launch.arguments, strict=True))
