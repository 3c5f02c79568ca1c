"""What the kernels may not do: read back, add in any order, wrap an offset, or keep much."""

import ast
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from truth import parameters, streams

pytest.importorskip('triton')

from megatron_mhc import ResidualConfig, ops  # noqa: E402
from megatron_mhc.kernels import backend, shipped  # noqa: E402
from megatron_mhc.kernels.traffic import arguments  # noqa: E402
from megatron_mhc.kernels.triton import projection, read_backward  # noqa: E402
from megatron_mhc.kernels.triton.launch import record_launches, span_of  # noqa: E402
from megatron_mhc.residual.hyper_connection import Pending  # noqa: E402
from megatron_mhc.residual.mhc import ManifoldHyperConnection  # noqa: E402

KERNELS = Path(__file__).resolve().parents[2] / 'kernels'
SOURCES = sorted([*(KERNELS / 'triton').glob('*.py'), *(KERNELS / 'autograd').glob('*.py')])
READ_BACK = {'item', 'tolist', 'cpu', 'numpy', 'nonzero', 'synchronize', 'is_nonzero'}


def kernel_names() -> set[str]:
    return {
        name for path in SOURCES for name in re.findall(r'def (\w+_kernel)\(', path.read_text())
    }


@pytest.mark.parametrize(
    'path',
    [*SOURCES, *(KERNELS / 'reference').glob('*.py')],
    ids=lambda path: f'{path.parent.name}/{path.name}',
)
def test_no_atomics_and_nothing_read_back(path):
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, 'id', '')
        assert 'atomic' not in name and name not in READ_BACK, f'{path.name}:{node.lineno}'


@pytest.mark.parametrize('n', [1, 2, 4, 8])
def test_a_step_runs_without_a_value(n):
    """On meta tensors, which have none: no grid and no branch depends on one."""
    launches = shipped.shipped_launches(n, 48, 100, torch.bfloat16)
    assert {launch.name for launch in launches} == kernel_names()
    assert all(tensor.is_meta for launch in launches for tensor in launch.tensors)


def kinds_of(launch) -> list[tuple[int, int]]:
    """The last program of those that do Sinkhorn, and the first of those behind them."""
    if not launch.name.startswith('maps'):
        return []
    first = math.ceil(arguments(launch)['T'] / launch.constants['BT'])
    return [(place, 0) for place in (first - 1, first) if place < launch.grid[0]]


@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('shape', [(3, 1), (67, 35), (3, 261), (40, 64)], ids=str)
def test_every_access_is_inside_its_tensor(n, shape, interpreter):
    """Of the first, a middle and the last programs; outputs are written to their ends."""
    from addresses import touched

    tokens, channels = shape
    for launch in shipped.shipped_launches(n, channels, tokens, torch.bfloat16):
        grid = (*launch.grid, 1)[:2]
        programs = itertools.product(*({0, size // 2, size - 1} for size in grid))
        seen = touched(launch, {*programs, *kinds_of(launch)})
        for name in seen.keys() & {'out_ptr', 'dx_ptr', 'dy_ptr', 'u_ptr'}:
            tensors = [t for t in launch.tensors if t.numel() == seen[name][1] + 1]
            assert tensors and seen[name][0] == 0, f'{launch.name}: {name}'


# Kernels that walk over the channels have many tokens, the others a few tokens of many channels.
TALL, WIDE = (2**27 + 3, 24), (19, 2**26)


@pytest.mark.parametrize('n', [2, 4, 8])
@pytest.mark.parametrize('kernels', ['streams', 'maps', 'read_backward'])
def test_offsets_beyond_32_bits(n, kernels, interpreter, monkeypatch):
    """T * n * C, and with many tokens T times the size of the maps, exceed 2^31 elements."""
    from addresses import touched

    # One block of tokens a program, so that the last program need not walk far.
    monkeypatch.setattr(read_backward, 'MOST_SEGMENTS', 2**40)
    monkeypatch.setattr('megatron_mhc.kernels.triton.launch.PROGRAMS', 2**40)
    tokens, channels = TALL
    launches = shipped.shipped_launches(n, channels, tokens, torch.bfloat16)
    seen = set()
    for launch in launches:
        of_maps = launch.name.startswith(('maps', 'sinkhorn'))
        kind = 'maps' if of_maps else 'streams'
        kind = 'read_backward' if launch.name.startswith('read_backward') else kind
        if kind != kernels or launch.name == 'pack_kernel':
            continue
        last = tuple(size - 1 for size in (*launch.grid, 1)[:2])
        seen.add(launch.name)
        for program in {last, *kinds_of(launch)[:1]}:
            largest = max(high for _, high in touched(launch, [program]).values())
            if not of_maps or n > 2:
                assert largest > 2**31, f'{launch.name} {program}: {largest}'
    assert seen


def test_offsets_of_wide_streams(interpreter):
    """Few tokens of so many channels that the last of them lies beyond 2^31 elements."""
    from addresses import touched

    tokens, channels = WIDE
    for launch in shipped.shipped_launches(4, channels, tokens, torch.bfloat16):
        if launch.name in ('read_backward_kernel', 'pre_forward_kernel', 'post_res_forward_kernel'):
            last = tuple(size - 1 for size in (*launch.grid, 1)[:2])
            assert max(high for _, high in touched(launch, [last]).values()) > 2**31


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_what_is_kept_for_backward(n, dtype, device, random_seed):
    """A read, a fused edge and a write keep, beside parameters, per token:

    x and x_new (2 n C values), y of both sublayers (2 C values), and in fp32 of each sublayer the
    projection (n^2 + 2n), 1/r (1), H_res (n^2) and H_post (n).
    """
    tokens, channels = 9, 20
    leaves = {name: p.requires_grad_() for name, p in parameters(n, channels, device).items()}
    bias = torch.randn(channels, device=device, requires_grad=True)
    x = streams(n, tokens, channels, device, dtype).requires_grad_()
    y1, y2 = (torch.randn(tokens, channels).to(device, dtype).requires_grad_() for _ in range(2))
    seed = torch.tensor([7], device=device)
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    options = {'num_streams': n, 'backend': 'triton'}
    mask = {'dropout': 0.1, 'seed': seed}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, carried = ops.read(x, **leaves, **options)
        x_new, _, carried = ops.write_read(y1, carried, **leaves, **options, y_bias=bias, **mask)
        ops.write(y2, carried, bias, **mask)
    known = [*leaves.values(), bias, seed]
    kept = sum(storages.values()) - sum(t.untyped_storage().nbytes() for t in known)
    maps = 2 * ((n * n + 2 * n) + 1 + n * n + n)
    assert kept == tokens * (2 * (n + 1) * channels * dtype.itemsize + maps * 4)


@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize('channels', [2560, 4096, 7168])
@pytest.mark.parametrize('tokens', [4096, 8192, 12288, 16384])
def test_the_last_wave_is_full(n, channels, tokens):
    """Kernels that split their work keep every SM of an H100 busy nine tenths of the time."""
    launches = shipped.op_launches(n, channels, tokens, torch.bfloat16)
    split = [one for one in launches if one.name.startswith(('projection', 'read_backward'))]
    assert len(split) == 2
    for one in split:
        waves = one.grid[0] * one.grid[1] / 132
        assert waves / math.ceil(waves) >= 0.9, (one.name, one.grid)


@pytest.mark.parametrize(
    ('programs', 'blocks', 'most', 'parts'),
    [
        (64, 512, 16, 8),  # as many as fill the GPU: 3.9 waves
        (112, 512, 16, 7),  # 5 would do, in 4.2 waves; 7 take 5.9
        (1, 3, 16, 3),  # never more parts than blocks
        (1056, 512, 16, 1),  # nor a cut where the programs alone fill 8 waves
        (20, 512, 16, 13),  # 16 take 2.4 waves and are the most; 13 fill 2
    ],
)
def test_parts_of_the_work(programs, blocks, most, parts):
    assert math.ceil(blocks / span_of(programs, blocks, most)) == parts


def test_recording_starts_nothing(device, random_seed):
    x = streams(4, 5, 6, device, torch.float32)
    with record_launches() as launches:
        ops.pre(x, torch.rand(5, 4, device=device), backend='triton')
    assert [launch.name for launch in launches] == ['pre_forward_kernel']
    assert projection.resolved_precision('auto', torch.bfloat16) == 'bf16x2'
    assert projection.resolved_precision('auto', torch.float32) == 'tf32x3'


# Of torch: what neither computes nor copies.
FREE = {'view', 'detach', 'slice', 'split', 'select', 'expand', 't', 'transpose', 'alias'} | {
    'empty', 'new_empty', 'empty_like', 'empty_strided', 'as_strided', '_unsafe_view', 'unsqueeze',
    'split_with_sizes',
}  # fmt: skip


class Computing(TorchDispatchMode):
    """Names of the torch operations that start something of their own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('n', [1, 2, 4])
def test_a_sublayer_starts_few_kernels(n, monkeypatch):
    """Forward and backward of a layer's two sublayers, as the modules call them, on meta tensors.

    A sublayer: pack, projection with F_post,res of the one before, maps with F_pre; their backward,
    that of the streams, and that of F_post,res. Of torch: two sums over programs, of the gradient
    of phi, and of those of b and alpha.
    """
    monkeypatch.setattr(backend, '_platform_obstacle', lambda device: None)
    tokens, channels = 4096, 256
    settings = ResidualConfig(num_residual_streams=n, kernel_backend='triton')
    first, second = (
        ManifoldHyperConnection(channels, settings, sublayer).to('meta') for sublayer in range(2)
    )
    wide, narrow = (
        torch.empty(tokens, size, dtype=torch.bfloat16, device='meta', requires_grad=True)
        for size in (n * channels, channels)
    )
    with record_launches() as launches, Computing() as torch_own:
        _, u1, carried = first(wide)
        _, u2, carried = second(Pending(narrow, carried))
        out = second.post(narrow, carried)
        torch.autograd.backward([u1, u2, out], [torch.empty_like(t) for t in (u1, u2, out)])
    # The first write and the last one are no edge: one kernel more for both sublayers.
    assert len(launches) <= 2 * 6 + 1, [launch.name for launch in launches]
    # The gradient of ``narrow``, which has two uses here, is an addition.
    own = [name for name in torch_own.names if not name.startswith('add')]
    assert len(own) <= 2 * 2, own
