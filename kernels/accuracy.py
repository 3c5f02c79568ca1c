"""How far the Triton kernels are from fp64, measured where they run.

Truth is fp64 autograd of the reference on the same inputs, already rounded to their dtype. Errors
are relative RMS, ``|got - want| / |want|`` over a whole tensor; bounds follow from the dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.kernels.autograd.fused_edge import Read, Write, WriteRead
from megatron_mhc.kernels.autograd.ops import Mapping, MappingSettings, PostRes, Pre, Sinkhorn
from megatron_mhc.kernels.backend import kernel_obstacle
from megatron_mhc.kernels.defaults import NORM_EPS
from megatron_mhc.kernels.reference import mapping_ref, post_res_ref, pre_ref, sinkhorn_ref
from megatron_mhc.kernels.triton.launch import interpreted

ITERATIONS = 20
DROPOUT = 0.1
MAPS = 1e-5
SINKHORN_GRADIENT = 2e-6
# Of values stored as streams are: fp32 arithmetic, or one rounding.
STORED = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Gradients of fp32 tensors, whatever the streams.
GRADIENTS = 2e-5
# Eight bf16 streams: backward multiplies phi in TF32 (triton/read_backward.py).
TF32 = 1e-3

TRUNCATES = (
    "Triton's interpreter cuts bf16 off where a GPU rounds to nearest: bounds of all that is "
    'stored in bf16, or comes from phi, whose parts are bf16, are twice those of a GPU.'
)


class Row(NamedTuple):
    """One quantity of one op; ``error`` and ``bound`` are relative RMS, 0 means bit for bit."""

    op: str
    quantity: str
    error: float
    bound: float
    ok: bool


def accuracy_table(
    device: torch.device,
    dtype: torch.dtype,
    num_streams: int,
    channels: int,
    tokens: int,
    seed: int,
    advance: Callable[[int], object] = bool,
) -> list[Row]:
    """Every op with all its gradients against fp64, and the fused edge against write and read.

    Args:
        device: a GPU, or the CPU where Triton interprets kernels.
        dtype: of the streams; num_streams: n; channels: C; tokens: T.
        seed: of the random inputs.
        advance: told of each op that is done, of ``OPS``.

    Returns:
        One row for each output and each gradient.

    Raises:
        ValueError: the kernels cannot run so.
    """
    obstacle = kernel_obstacle(device, dtype, num_streams)
    if obstacle:
        raise ValueError(obstacle)
    inputs = _Inputs(device, dtype, num_streams, channels, tokens, seed)
    rows = []
    for op in OPS:
        rows += op(inputs)
        advance(1)
    return rows


class _Inputs:
    """Random tensors of one problem, and the bounds that hold for it."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        n: int,
        channels: int,
        tokens: int,
        seed: int,
    ) -> None:
        self.n, self.channels, self.tokens = n, channels, tokens
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.settings = MappingSettings(n, ITERATIONS, NORM_EPS, 'auto')
        m, width = n * n + 2 * n, n * channels
        self.x = self.random(tokens, width).to(dtype)
        self.y = self.random(tokens, channels).to(dtype)
        self.mapping = {
            'weight': self.random(m, width) / width**0.5,
            'bias': self.random(m),
            'alpha': 1 + 0.1 * self.random(3),
        }
        self.seed = torch.tensor([seed], dtype=torch.int64, device=device)
        slack = 2 if interpreted() and dtype == torch.bfloat16 else 1
        self.stored, self.maps = slack * STORED[dtype], slack * MAPS
        self.gradients = slack * GRADIENTS
        if n == 8 and dtype == torch.bfloat16:
            self.gradients = max(self.gradients, TF32)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def random_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        n, tokens = self.n, self.tokens
        pre, post, res = self.random(tokens, n), self.random(tokens, n), self.random(tokens, n, n)
        return pre.sigmoid(), 2 * post.sigmoid(), res.softmax(-1)

    def parameters(self, mapping: dict[str, Tensor]) -> tuple[Any, ...]:
        """As the autograd functions take them."""
        return mapping['weight'], mapping['bias'], self.settings, mapping['alpha']

    def reference_mapping(self, x: Tensor, mapping: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return mapping_ref(
            x, **mapping, num_streams=self.n, sinkhorn_iterations=ITERATIONS, norm_eps=NORM_EPS
        )


def _sinkhorn(inputs: _Inputs) -> list[Row]:
    logits = 2 * inputs.random(inputs.tokens, inputs.n, inputs.n)
    return _rows(
        *('sinkhorn', inputs, {'logits': logits}, {'h_res': MAPS, 'dlogits': SINKHORN_GRADIENT}),
        lambda logits: (Sinkhorn.apply(logits, ITERATIONS),),
        lambda logits: (sinkhorn_ref(logits, ITERATIONS),),
    )


def _mapping(inputs: _Inputs) -> list[Row]:
    outputs = dict.fromkeys(('h_pre', 'h_post', 'h_res'), inputs.maps)
    gradients = dict.fromkeys(('dweight', 'dbias', 'dalpha'), inputs.gradients)
    bounds = outputs | {'dx': inputs.stored + inputs.gradients} | gradients
    return _rows(
        *('mapping', inputs, {'x': inputs.x, **inputs.mapping}, bounds),
        lambda x, **mapping: Mapping.apply(x, *inputs.parameters(mapping)),
        lambda x, **mapping: inputs.reference_mapping(x, mapping),
        sums={'dalpha': 'dbias', 'dweight': 'dbias'},
    )


def _pre(inputs: _Inputs) -> list[Row]:
    tensors = {'x': inputs.x, 'h_pre': inputs.random_maps()[0]}
    bounds = {'u': inputs.stored, 'dx': inputs.stored, 'dh_pre': GRADIENTS}
    return _rows(
        *('pre', inputs, tensors, bounds),
        lambda x, h_pre: (Pre.apply(x, h_pre),),
        lambda x, h_pre: (pre_ref(x, h_pre),),
    )


def _post_res(inputs: _Inputs) -> list[Row]:
    _, h_post, h_res = inputs.random_maps()
    bias = inputs.random(inputs.channels).to(inputs.dtype)
    tensors = {'x': inputs.x, 'y': inputs.y, 'h_post': h_post, 'h_res': h_res, 'bias': bias}
    bounds = dict.fromkeys(('x_new', 'dx', 'dy'), inputs.stored)
    bounds |= {'dh_post': GRADIENTS, 'dh_res': GRADIENTS, 'dbias': 2 * inputs.stored}
    mask = (DROPOUT, inputs.seed)
    return _rows(
        *('post_res', inputs, tensors, bounds),
        lambda x, y, h_post, h_res, bias: (PostRes.apply(x, y, h_post, h_res, bias, *mask),),
        lambda x, y, h_post, h_res, bias: (post_res_ref(x, y, h_post, h_res, bias, *mask),),
        # dbias adds the rows of dy as they are stored.
        sums={'dbias': 'dy'},
    )


def _sublayer(inputs: _Inputs) -> list[Row]:
    """``read`` and ``write``, whose gradient of the streams is written once."""

    def kernels(x: Tensor, y: Tensor, **mapping: Tensor) -> tuple[Tensor, ...]:
        u, h_post, h_res, carried = Read.apply(x, *inputs.parameters(mapping))
        return u, Write.apply(carried, y, h_post, h_res, None, 0.0, None)

    def reference(x: Tensor, y: Tensor, **mapping: Tensor) -> tuple[Tensor, ...]:
        h_pre, h_post, h_res = inputs.reference_mapping(x, mapping)
        return pre_ref(x, h_pre), post_res_ref(x, y, h_post, h_res)

    stored = inputs.stored + inputs.maps
    bounds = dict.fromkeys(('u', 'x_new', 'dx', 'dy'), stored)
    bounds |= dict.fromkeys(('dweight', 'dbias', 'dalpha'), 2 * inputs.gradients)
    tensors = {'x': inputs.x, 'y': inputs.y, **inputs.mapping}
    sums = {'dalpha': 'dbias', 'dweight': 'dbias'}
    return _rows('read, write', inputs, tensors, bounds, kernels, reference, sums)


def _fused_edge(inputs: _Inputs) -> list[Row]:
    """``write_read`` against ``write`` and then ``read``: every bit of outputs and gradients."""

    def run(fused: bool) -> Callable[..., tuple[Tensor, ...]]:
        def kernels(x: Tensor, y: Tensor, **mapping: Tensor) -> tuple[Tensor, ...]:
            parameters = inputs.parameters(mapping)
            _, h_post, h_res, carried = Read.apply(x, *parameters)
            written = (carried, y, h_post, h_res, None, DROPOUT, inputs.seed)
            if fused:
                together: tuple[Tensor, ...] = WriteRead.apply(*written, *parameters)
                return together[:4]
            x_new = Write.apply(*written)
            return x_new, *Read.apply(x_new, *parameters)[:3]

        return kernels

    tensors = {'x': inputs.x, 'y': inputs.y, **inputs.mapping}
    want = run(False)
    cotangents = [_random_like(inputs, out) for out in want(**tensors)]
    pairs = [_with_gradients(function, tensors, cotangents) for function in (run(True), want)]
    names = ['x_new', 'u', 'h_post', 'h_res', *(f'd{name}' for name in tensors)]
    return [
        Row('write_read, write + read', name, error := _error(got, other.double()), 0.0, error == 0)
        for name, got, other in zip(names, *pairs, strict=True)
    ]


# In the order of the table.
OPS = (_sinkhorn, _mapping, _pre, _post_res, _sublayer, _fused_edge)


def _rows(
    op: str,
    inputs: _Inputs,
    tensors: dict[str, Tensor],
    bounds: dict[str, float],
    kernels: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    sums: dict[str, str] | None = None,
) -> list[Row]:
    """``bounds`` names the outputs and then the gradients, in the order of ``tensors``.

    ``sums`` names gradients that add many terms, which may cancel, and another that is as large as
    the terms are.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        shapes = kernels(**tensors)
    cotangents = [_random_like(inputs, out) for out in shapes]
    got = _with_gradients(kernels, tensors, cotangents)
    want = _with_gradients(reference, wide, [grad.double() for grad in cotangents])
    sizes = dict(zip(bounds, want, strict=True))
    rows = []
    for (name, bound), a, b in zip(bounds.items(), got, want, strict=True):
        error = _error(a, b, sizes.get((sums or {}).get(name, '')))
        rows.append(Row(op, name, error, bound, error < bound))
    return rows


def _random_like(inputs: _Inputs, tensor: Tensor) -> Tensor:
    return inputs.random(*tensor.shape).to(tensor.dtype)


def _with_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor],
    cotangents: list[Tensor],
) -> list[Tensor]:
    """Outputs, then gradients in the order of ``tensors``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return [*(out.detach() for out in outputs), *gradients]


def _error(got: Tensor, want: Tensor, other: Tensor | None = None) -> float:
    size = want.norm() if other is None else torch.maximum(want.norm(), other.norm())
    # What is zero in truth (one stream leaves H_res no freedom) is held to an absolute bound.
    return float((got.double() - want).norm() / size.clamp(min=1e-2 * want.numel() ** 0.5))
