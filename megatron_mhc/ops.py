"""The stable op contract: Sinkhorn-Knopp, the mapping, F_pre and F_post,res.

Every op is differentiable in each tensor argument. Shapes follow the legend of
``megatron_mhc.kernels.reference``: ``...`` tokens (Megatron: ``[s, b]``), n streams, C hidden size,
streams flattened to n*C with the stream index outer. Wrong input is a ValueError that names the
argument, what it was and what was wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc.kernels import reference

BACKENDS = ('auto', 'torch')
NORM_EPS = 1e-20
"""Added to the mean square of the streams (mHC, Table 5: RMSNorm eps)."""


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Project logits to doubly stochastic matrices, columns first, rows last (mHC, Eq 9).

    Args:
        logits: ``[..., n, n]``, read in fp32 (fp64 stays fp64).
        iterations: column-then-row passes, at least 1.

    Returns:
        ``[..., n, n]``; row sums are 1 to rounding.
    """
    _require_float('logits', logits)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f'logits: got shape {_shape(logits)}, wanted [..., n, n]')
    _require_positive('iterations', iterations)
    return reference.sinkhorn_ref(logits, iterations)


def mapping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_streams: int,
    sinkhorn_iterations: int = 20,
    norm_eps: float = NORM_EPS,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of one sublayer: H_pre = sigma, H_post = 2 sigma, H_res = Sinkhorn (mHC, Eq 14-19).

    Args:
        x: ``[..., n*C]`` streams, any float dtype.
        weight: ``[n*n + 2n, n*C]``, rows pre | post | res (res row-major).
        bias: ``[n*n + 2n]``, added after the division by the norm.
        alpha: ``[3]``, gating factors of pre, post, res.
        num_streams: n, at least 1.
        sinkhorn_iterations: passes of Eq 9 (paper: 20).
        norm_eps: added under the root of the mean square.
        backend: ``auto`` or ``torch``.

    Returns:
        ``h_pre [..., n]``, ``h_post [..., n]``, ``h_res [..., n, n]`` in fp32 (fp64 for fp64 x).
    """
    n = num_streams
    _require_positive('num_streams', n)
    _require_positive('sinkhorn_iterations', sinkhorn_iterations)
    for name, tensor in (('x', x), ('weight', weight), ('bias', bias), ('alpha', alpha)):
        _require_float(name, tensor)
    if x.dim() < 1 or x.shape[-1] % n or not x.shape[-1]:
        raise ValueError(f'x: got shape {_shape(x)}, wanted [..., n*C] with n = {n} streams')
    maps = n * n + 2 * n
    for name, tensor, wanted in (
        ('weight', weight, (maps, x.shape[-1])),
        ('bias', bias, (maps,)),
        ('alpha', alpha, (3,)),
    ):
        _require_shape(name, tensor, wanted)
    _require_same_device(x, weight=weight, bias=bias, alpha=alpha)
    if norm_eps < 0:
        raise ValueError(f'norm_eps: got {norm_eps}, wanted >= 0 (it is added to a mean square)')
    if backend not in BACKENDS:
        raise ValueError(f'backend: got {backend!r}, wanted one of {BACKENDS}')
    return reference.mapping_ref(
        x,
        weight,
        bias,
        alpha,
        num_streams=n,
        sinkhorn_iterations=sinkhorn_iterations,
        norm_eps=norm_eps,
    )


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """F_pre, the sublayer input: ``sum_j h_pre[j] * x[j]`` (mHC, Eq 3).

    Args:
        x: ``[..., n*C]`` streams.
        h_pre: ``[..., n]``.

    Returns:
        ``[..., C]`` in the dtype of x.
    """
    _require_float('x', x)
    _require_float('h_pre', h_pre)
    _require_streams(x, 'h_pre', h_pre, h_pre.shape[-1:])
    _require_same_device(x, h_pre=h_pre)
    return reference.pre_ref(x, h_pre)


def post_res(
    x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, bias: Tensor | None = None
) -> Tensor:
    """F_post,res: ``x'[i] = sum_j h_res[i, j] * x[j] + h_post[i] * (y + bias)`` (mHC, Eq 3).

    Args:
        x: ``[..., n*C]`` streams.
        y: ``[..., C]`` sublayer output.
        h_post: ``[..., n]``.
        h_res: ``[..., n, n]``, row index = new stream.
        bias: ``[C]`` added to y, or None.

    Returns:
        ``[..., n*C]`` in the dtype of x.
    """
    for name, tensor in (('x', x), ('y', y), ('h_post', h_post), ('h_res', h_res)):
        _require_float(name, tensor)
    n = h_post.shape[-1]
    _require_streams(x, 'h_post', h_post, (n,))
    _require_streams(x, 'h_res', h_res, (n, n))
    _require_shape('y', y, (*x.shape[:-1], x.shape[-1] // n))
    if bias is not None:
        _require_shape('bias', bias, y.shape[-1:])
    _require_same_device(x, y=y, h_post=h_post, h_res=h_res, bias=bias)
    return reference.post_res_ref(x, y, h_post, h_res, bias)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _require_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f'{name}: got {got}, wanted a floating-point tensor')


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'{name}: got {value!r}, wanted an integer >= 1')


def _require_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f'{name}: got shape {_shape(tensor)}, wanted {list(wanted)}')


def _require_streams(x: Tensor, name: str, maps: Tensor, tail: tuple[int, ...]) -> None:
    n = tail[0] if tail else 0
    if not n or x.dim() < 1 or not x.shape[-1] or x.shape[-1] % n:
        raise ValueError(f'x: got shape {_shape(x)}, wanted [..., n*C] with n = {n} from {name}')
    _require_shape(name, maps, (*x.shape[:-1], *tail))


def _require_same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f'{name}: got device {tensor.device}, wanted {x.device} like x')
