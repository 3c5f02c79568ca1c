"""The stable op contract: Sinkhorn-Knopp, the mapping, F_pre and F_post,res.

Every op is differentiable in each floating-point argument. Shapes follow the legend of
``megatron_mhc.kernels.reference``: ``...`` tokens (Megatron: ``[s, b]``), n streams, C hidden size,
streams flattened to n*C with the stream index outer. Wrong input is a ValueError that names the
argument, what it was and what was wanted.

``backend`` is ``auto`` (Triton kernels where they run, logged once an op, else the torch
reference), ``triton`` (an error where they cannot run) or ``torch``. A sublayer calls ``read`` and
``write``, or ``write_read`` between two sublayers: the same mathematics as ``mapping``, ``pre`` and
``post_res``, but the kernels then write the gradient of the streams once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc.kernels import reference
from megatron_mhc.kernels.backend import use_triton
from megatron_mhc.kernels.defaults import BACKENDS, NORM_EPS, PRECISIONS
from megatron_mhc.kernels.numerics import PAPER, takes_triton
from megatron_mhc.kernels.reference.dropout import dropout_seed
from megatron_mhc.op_inputs import (
    require_backend,
    require_float,
    require_map,
    require_mapping,
    require_numerics,
    require_positive,
    require_post_res,
    require_same_device,
    require_streams,
    shape_of,
)

__all__ = [
    'BACKENDS',
    'NORM_EPS',
    'PRECISIONS',
    'Carried',
    'mapping',
    'post_res',
    'pre',
    'read',
    'sinkhorn',
    'write',
    'write_read',
]


class Carried(NamedTuple):
    """What ``write`` needs of the ``read`` before it. Give it to one ``write`` and nothing else.

    Where ``fused``, the gradient that flows back through ``x`` is not that of the streams.
    """

    x: Tensor
    h_post: Tensor
    h_res: Tensor
    fused: bool


def sinkhorn(
    logits: Tensor, iterations: int = 20, *, backend: str = 'auto', numerics: str = PAPER
) -> Tensor:
    """Project logits to doubly stochastic matrices, columns first, rows last (mHC, Eq 9).

    Args:
        logits: ``[..., n, n]``, read in fp32 (fp64 stays fp64).
        iterations: column-then-row passes, at least 1.
        backend: ``auto``, ``triton`` or ``torch``.
        numerics: one of ``NUMERICS`` (``kernels/numerics.py``): order of passes, eps.

    Returns:
        ``[..., n, n]``; row sums are 1 to rounding where ``numerics`` is ``paper``.
    """
    require_numerics(numerics)
    require_float('logits', logits)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or not logits.shape[-1]:
        raise ValueError(f'logits: got shape {shape_of(logits)}, wanted [..., n, n]')
    require_positive('iterations', iterations)
    n = logits.shape[-1]
    if not _on_kernels(backend, 'sinkhorn', logits, n, numerics):
        return reference.sinkhorn_as(logits, iterations, numerics)
    from megatron_mhc.kernels.autograd.ops import Sinkhorn

    h_res: Tensor = Sinkhorn.apply(_rows(logits.float(), n, n), iterations)
    return h_res.view(logits.shape)


def mapping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | Sequence[Tensor],
    *,
    num_streams: int,
    sinkhorn_iterations: int = 20,
    norm_eps: float = NORM_EPS,
    backend: str = 'auto',
    precision: str = 'auto',
    numerics: str = PAPER,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of one sublayer: H_pre = sigma, H_post = 2 sigma, H_res = Sinkhorn (mHC, Eq 14-19).

    Args:
        x: ``[..., n*C]`` streams, any float dtype.
        weight: ``[n*n + 2n, n*C]``, rows pre | post | res (res row-major).
        bias: ``[n*n + 2n]``, added after the division by the norm.
        alpha: ``[3]``, gating factors of pre, post, res; or three ``[1]``, which are not copied.
        num_streams: n, at least 1.
        sinkhorn_iterations: passes of Eq 9 (paper: 20).
        norm_eps: added under the root of the mean square (the paper: 1e-20; DeepSeek-V4: 1e-6).
            Under some ``numerics`` it is added to the root.
        backend: ``auto``, ``triton`` or ``torch``.
        precision: one of ``PRECISIONS``.
        numerics: one of ``NUMERICS`` (``kernels/numerics.py``); the kernels have ``paper``.

    Returns:
        ``h_pre [..., n]``, ``h_post [..., n]``, ``h_res [..., n, n]`` in fp32 (fp64 for fp64 x).
        NaN for a token whose sum of nC squares is beyond fp32, on every backend.
    """
    n = num_streams
    require_numerics(numerics)
    require_mapping(x, weight, bias, alpha, n, sinkhorn_iterations, norm_eps, precision)
    x = _values_in_line(x)
    if not _on_kernels(backend, 'mapping', x, n, numerics):
        return reference.mapping_as(
            *(x, weight, bias, _joined(alpha)),
            num_streams=n,
            sinkhorn_iterations=sinkhorn_iterations,
            norm_eps=norm_eps,
            numerics=numerics,
        )
    from megatron_mhc.kernels.autograd.ops import Mapping, MappingSettings

    settings = MappingSettings(n, sinkhorn_iterations, norm_eps, precision)
    h_pre, h_post, h_res = Mapping.apply(
        _rows(x, x.shape[-1]), *_parameters(weight, bias), settings, *_separate(alpha)
    )
    tokens = x.shape[:-1]
    return h_pre.view(*tokens, n), h_post.view(*tokens, n), h_res.view(*tokens, n, n)


def pre(x: Tensor, h_pre: Tensor, *, backend: str = 'auto') -> Tensor:
    """F_pre, the sublayer input: ``sum_j h_pre[j] * x[j]`` (mHC, Eq 3).

    Args:
        x: ``[..., n*C]`` streams.
        h_pre: ``[..., n]``.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        ``[..., C]`` in the dtype of x.
    """
    require_float('x', x)
    require_float('h_pre', h_pre)
    require_map('h_pre', h_pre)
    require_streams(x, 'h_pre', h_pre, h_pre.shape[-1:])
    require_same_device(x, h_pre=h_pre)
    x = _values_in_line(x)
    n = h_pre.shape[-1]
    if not _on_kernels(backend, 'pre', x, n):
        return reference.pre_ref(x, h_pre)
    from megatron_mhc.kernels.autograd.ops import Pre

    u: Tensor = Pre.apply(_rows(x, x.shape[-1]), _rows(h_pre.float(), n))
    return u.view(*x.shape[:-1], -1)


def post_res(
    x: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = 'auto',
    numerics: str = PAPER,
) -> Tensor:
    """F_post,res: ``x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * dropout(y + bias)`` (mHC, Eq 3).

    Args:
        x: ``[..., n*C]`` streams.
        y: ``[..., C]`` sublayer output.
        h_post: ``[..., n]``.
        h_res: ``[..., n, n]``, row index = new stream.
        bias: ``[C]`` added to y, or None.
        dropout: probability of dropping an element of y + bias; those kept are divided by 1 - p.
        seed: ``[1]`` int64 that determines the mask, the same on every backend. None draws one from
            the device's ambient generator.
        backend: ``auto``, ``triton`` or ``torch``.
        numerics: one of ``NUMERICS``: whether both terms are rounded before they are added.

    Returns:
        ``[..., n*C]`` in the dtype of x.
    """
    require_numerics(numerics)
    require_post_res(x, y, h_post, h_res, bias, dropout, seed)
    x = _values_in_line(x)
    n = h_post.shape[-1]
    if dropout > 0 and seed is None:
        seed = dropout_seed(x.device)
    if not _on_kernels(backend, 'post_res', x, n, numerics):
        return reference.post_res_as(x, y, h_post, h_res, bias, dropout, seed, numerics)
    from megatron_mhc.kernels.autograd.ops import PostRes

    written = (
        *(_rows(x, x.shape[-1]), _rows(y, y.shape[-1])),
        *(_rows(h_post.float(), n), _rows(h_res.float(), n, n)),
    )
    x_new: Tensor = PostRes.apply(*written, _vector(bias), dropout, seed)
    return x_new.view(x.shape)


def read(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | Sequence[Tensor],
    *,
    num_streams: int,
    sinkhorn_iterations: int = 20,
    norm_eps: float = NORM_EPS,
    backend: str = 'auto',
    precision: str = 'auto',
) -> tuple[Tensor, Carried]:
    """``mapping`` and ``pre`` of one sublayer; arguments as for ``mapping``.

    Returns:
        The sublayer input ``[..., C]``, and what the ``write`` of the same sublayer needs.
    """
    n = num_streams
    require_mapping(x, weight, bias, alpha, n, sinkhorn_iterations, norm_eps, precision)
    x = _values_in_line(x)
    if not _on_kernels(backend, 'read', x, n):
        u, h_post, h_res, carried = reference.read_ref(
            x, weight, bias, _joined(alpha), n, sinkhorn_iterations, norm_eps
        )
        return u, Carried(carried, h_post, h_res, fused=False)
    from megatron_mhc.kernels.autograd.fused_edge import Read
    from megatron_mhc.kernels.autograd.ops import MappingSettings

    settings = MappingSettings(n, sinkhorn_iterations, norm_eps, precision)
    outputs = Read.apply(x, *_parameters(weight, bias), settings, *_separate(alpha))
    return _read_outputs(*outputs)


def write(
    y: Tensor,
    carried: Carried,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = 'auto',
    numerics: str = PAPER,
) -> Tensor:
    """``post_res`` of the streams and maps that ``read`` left; other arguments as there.

    A ``carried`` of the kernels is written by them; ``backend`` matters for others only.

    Returns:
        ``[..., n*C]`` in the dtype of the streams.
    """
    require_backend(backend)
    _require_carried(carried)
    x, h_post, h_res, fused = carried
    if not fused:
        arguments = x, y, h_post, h_res, bias
        return post_res(*arguments, dropout=dropout, seed=seed, backend=backend, numerics=numerics)
    if not takes_triton(numerics, 'post_res'):
        raise ValueError(
            f"numerics: got {numerics!r}, but carried is of the kernels, which read as 'paper' "
            'does; take mapping, pre and post_res'
        )
    require_post_res(x, y, h_post, h_res, bias, dropout, seed)
    if dropout > 0 and seed is None:
        seed = dropout_seed(x.device)
    from megatron_mhc.kernels.autograd.fused_edge import Write

    written = x, y, h_post.float(), h_res.float()
    x_new: Tensor = Write.apply(*written, _vector(bias), dropout, seed)
    return x_new


def write_read(
    y: Tensor,
    carried: Carried,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | Sequence[Tensor],
    *,
    num_streams: int,
    sinkhorn_iterations: int = 20,
    norm_eps: float = NORM_EPS,
    y_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = 'auto',
    precision: str = 'auto',
) -> tuple[Tensor, Tensor, Carried]:
    """The fused edge: ``write`` of one sublayer and ``read`` of the next, in one pass.

    ``y``, ``carried``, ``y_bias``, ``dropout`` and ``seed`` are as for ``write`` of the first
    sublayer; ``weight``, ``bias``, ``alpha`` and the others as for ``read`` of the second.

    Returns:
        The streams between the two, bit for bit those of ``write``; the second sublayer's input;
        and what its ``write`` needs.
    """
    require_backend(backend)
    _require_carried(carried)
    require_positive('num_streams', num_streams)
    x = carried.x
    if carried.h_post.shape[-1] != num_streams:
        raise ValueError(
            f'num_streams: got {num_streams}, wanted {carried.h_post.shape[-1]} as in carried'
        )
    if not carried.fused or backend == 'torch':
        x_new = write(y, carried, y_bias, dropout=dropout, seed=seed, backend=backend)
        u, carried = read(
            *(x_new, weight, bias, alpha),
            num_streams=num_streams,
            sinkhorn_iterations=sinkhorn_iterations,
            norm_eps=norm_eps,
            backend=backend,
            precision=precision,
        )
        return x_new, u, carried
    n = num_streams
    require_mapping(x, weight, bias, alpha, n, sinkhorn_iterations, norm_eps, precision)
    require_post_res(
        *(x, y, carried.h_post, carried.h_res, y_bias, dropout, seed), bias_name='y_bias'
    )
    if dropout > 0 and seed is None:
        seed = dropout_seed(x.device)
    from megatron_mhc.kernels.autograd.fused_edge import WriteRead
    from megatron_mhc.kernels.autograd.ops import MappingSettings

    settings = MappingSettings(n, sinkhorn_iterations, norm_eps, precision)
    x_new, *outputs = WriteRead.apply(
        *(x, y, carried.h_post.float(), carried.h_res.float(), _vector(y_bias), dropout, seed),
        *(*_parameters(weight, bias), settings, *_separate(alpha)),
    )
    return x_new, *_read_outputs(*outputs)


def _require_carried(carried: Carried) -> None:
    if not isinstance(carried, Carried):
        kind = type(carried).__name__
        raise ValueError(f'carried: got {kind}, wanted what read returns as its second value')
    for name in ('x', 'h_post', 'h_res'):
        require_float(f'carried.{name}', getattr(carried, name))
    require_map('carried.h_post', carried.h_post)


def _on_kernels(backend: str, op: str, x: Tensor, n: int, numerics: str = PAPER) -> bool:
    """Whether the kernels run: no grid covers no tokens, whose shapes and gradients torch knows."""
    return use_triton(backend, op, x.device, x.dtype, n, numerics) and x.numel() > 0


def _values_in_line(x: Tensor) -> Tensor:
    """A view whose last axis is strided would be read in another order of sums."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(tensor: Tensor, *tail: int) -> Tensor:
    """The leading dimensions flattened to T, as the kernels take it."""
    return tensor.reshape(-1, *tail).contiguous()


def _vector(bias: Tensor | None) -> Tensor | None:
    """The kernels read a bias value after value, whatever view it is."""
    return None if bias is None else bias.contiguous()


def _parameters(*parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(parameter.float().contiguous() for parameter in parameters)


def _joined(alpha: Tensor | Sequence[Tensor]) -> Tensor:
    """As the reference takes the gating factors."""
    return alpha if isinstance(alpha, Tensor) else torch.cat([*alpha])


def _separate(alpha: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As the kernels take them: one tensor, or three that nobody joins."""
    return _parameters(*((alpha,) if isinstance(alpha, Tensor) else alpha))


def _read_outputs(
    u: Tensor, h_post: Tensor, h_res: Tensor, carried: Tensor
) -> tuple[Tensor, Carried]:
    return u, Carried(carried, h_post, h_res, fused=True)
