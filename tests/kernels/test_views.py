"""Inputs that are views, at odd offsets or with strides, and odd hidden sizes: same bits, a log."""

import json
import logging

import pytest
import torch
from reporting import compiling
from truth import TOLERANCE, cotangents_of, error, parameters, streams, with_gradients

from megatron_mhc import ops
from megatron_mhc.kernels.offline import specialization
from megatron_mhc.kernels.triton import alignment

# n, T, C: rows that 16 divides, that only 8 divides, and odd ones.
SHAPES = [(1, 9, 48), (2, 10, 40), (4, 6, 35)]
MAPPING = ('weight', 'bias', 'alpha')


def shifted(elements):
    def view(tensor):
        """The same values, contiguous, ``elements`` behind the start of their storage."""
        whole = torch.cat([tensor.new_full((elements,), float('nan')), tensor.flatten()])
        return whole[elements:].view(tensor.shape)

    return view


def in_wide_rows(tensor):
    """The same values in rows (of a vector: single values) with others between them."""
    if tensor.dim() == 1:
        return torch.stack([tensor, tensor.detach() + 1], -1)[:, 0]
    return torch.nn.functional.pad(tensor, (1, 2), value=float('nan'))[..., 1:-2]


def batch_first(tensor):
    """Streams ``[T, ...]`` that lie as ``[C, ..., T]`` transposed, but for the last axis."""
    if tensor.dim() < 3:
        return in_wide_rows(tensor)
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


VIEWS = {
    'offset 1': shifted(1),
    'offset 3': shifted(3),
    'wide rows': in_wide_rows,
    'batch first': batch_first,
}


def inputs(n, tokens, channels, device, dtype):
    shape = (tokens // 3, 3) if tokens % 3 == 0 else (tokens // 5, 5)
    tensors = {
        'x': streams(n, tokens, channels, device, dtype).view(*shape, -1),
        'y': torch.randn(*shape, channels).to(device, dtype),
        'y2': torch.randn(*shape, channels).to(device, dtype),
        'y_bias': torch.randn(channels).to(device, dtype),
        'logits': torch.randn(*shape, n, n).to(device),
    }
    return tensors | parameters(n, channels, device)


def run_with(n, seed, view, backend='triton'):
    """Every op, each tensor that comes from outside as ``view`` shows it."""
    mask = {'dropout': 0.2, 'seed': seed}
    options = {'num_streams': n, 'sinkhorn_iterations': 3, 'backend': backend}

    def run(**leaves):
        t = {name: view(leaf) for name, leaf in leaves.items()}
        mapping = [t[name] for name in MAPPING]
        u, first = ops.read(t['x'], *mapping, **options)
        x_new, u2, second = ops.write_read(
            t['y'], first, *mapping, **options, y_bias=t['y_bias'], **mask
        )
        out = ops.write(t['y2'], second, t['y_bias'], **mask, backend=backend)
        h_pre, h_post, h_res = (view(h) for h in ops.mapping(t['x'], *mapping, **options))
        alone = ops.pre(t['x'], h_pre, backend=backend)
        apart = ops.post_res(t['x'], t['y'], h_post, h_res, t['y_bias'], **mask, backend=backend)
        return u, x_new, u2, out, alone, apart, ops.sinkhorn(t['logits'], 3, backend=backend)

    return run


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_views_give_the_same_bits(shape, device, random_seed):
    """Outputs and all gradients, whose cotangents are views too; and near to the reference."""
    tensors = inputs(*shape, device, torch.bfloat16)
    seed = torch.tensor([3], device=device)
    n = shape[0]
    plain = run_with(n, seed, lambda tensor: tensor)
    near = run_with(n, seed, lambda tensor: tensor, 'torch')(**tensors)
    cotangents = cotangents_of(*(out.detach() for out in near))
    want, want_gradients = with_gradients(plain, tensors, cotangents)
    limit = 2 * TOLERANCE[torch.bfloat16].streams
    for a, b in zip(want, near, strict=True):
        assert error(a, b.detach().double()) < limit
    for kind, view in VIEWS.items():
        seen = tuple(view(cotangent) for cotangent in cotangents)
        got, gradients = with_gradients(run_with(n, seed, view), tensors, seen)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), kind
        for name, gradient in gradients.items():
            assert torch.equal(gradient, want_gradients[name]), (kind, name)


@pytest.fixture
def said(caplog, monkeypatch):
    """The log, as if no kernel had run before in this process."""
    monkeypatch.setattr(alignment, 'SAID', set())
    caplog.set_level(logging.INFO, 'megatron_mhc.kernels')
    return lambda: [r.getMessage() for r in caplog.records if 'value by value' in r.getMessage()]


def test_a_stream_at_an_odd_offset_is_named_once(said, device):
    x, h_pre = torch.randn(5, 4 * 16, device=device), torch.rand(5, 4, device=device)
    y, h_post = torch.randn(5, 16, device=device), torch.rand(5, 4, device=device)
    h_res = torch.rand(5, 4, 4, device=device)
    ops.post_res(x, y, h_post, h_res, backend='triton')
    assert not said()
    for _ in range(2):
        ops.post_res(x, shifted(3)(y), h_post, h_res, backend='triton')
        ops.pre(shifted(1)(x), h_pre, backend='triton')
    (line,) = said()
    assert 'the sublayer output y (12 bytes)' in line and '.clone()' in line


@pytest.mark.parametrize('name', ['the gradient of the streams', 'the sublayer input'])
def test_a_gradient_at_an_odd_offset_is_named(name, said, device):
    x = torch.randn(5, 2 * 16, device=device, requires_grad=True)
    maps = torch.rand(5, 2, device=device), torch.rand(5, 2, 2, device=device)
    if name == 'the sublayer input':
        out = ops.pre(x, maps[0], backend='triton')
    else:
        out = ops.post_res(x, torch.randn(5, 16, device=device), *maps, backend='triton')
    out.backward(shifted(1)(torch.ones_like(out)))
    (line,) = said()
    assert f'{name} (4 bytes)' in line


def test_a_hidden_size_that_16_does_not_divide_is_named_once(said, device):
    for channels in (40, 24):
        x = torch.randn(5, 2 * channels, device=device)
        ops.pre(x, torch.rand(5, 2, device=device), backend='triton')
    (line,) = said()
    assert 'hidden size 40' in line and 'such as 48' in line


@pytest.mark.parametrize('elements', range(9))
def test_a_recorded_view_is_specialised_as_the_launcher_would(elements, device):
    """On meta by the offset in its storage, elsewhere by its address."""
    for where in ('meta', device):
        view = torch.empty(64, dtype=torch.bfloat16, device=where)[elements:]
        assert specialization(view) == ('*bf16', elements % 8 == 0), where


# Prints what the kernels take for streams and y that start one element late.
SHIFTED = """
import dataclasses, json, torch
from megatron_mhc.kernels import offline, shipped
from megatron_mhc.kernels.traffic import stream_names
def late(value):
    if getattr(value, 'ndim', 0) != 2 or value.dtype != torch.bfloat16:
        return value
    return torch.empty(value.numel() + 1, dtype=value.dtype, device='meta')[1:].view(value.shape)
launches = shipped.shipped_launches(4, 4096, 8192, torch.bfloat16)
launches = [l for l in launches if l.name in ('pre_forward_kernel', 'post_res_forward_kernel')]
late = [dataclasses.replace(l, arguments=tuple(map(late, l.arguments))) for l in launches]
for launch in late:
    (found,) = offline.compile_launches([(launch, 90)])
    widths = {name: found.narrowest[name] for name in stream_names(launch)}
    print(json.dumps([launch.name, widths]))
raise SystemExit
"""


def test_views_at_odd_offsets_compile_to_narrow_accesses():
    """What the log line warns of."""
    result = compiling(SHIFTED)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) > 2, result.stderr
    for name, widths in rows:
        assert set(widths.values()) == {16}, (name, widths)
