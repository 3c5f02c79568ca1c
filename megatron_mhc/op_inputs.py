"""What the ops accept, checked before anything runs.

Each check raises a ValueError that names the argument, what it was and what was wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mhc.inputs.values import MOST_ITERATIONS, MOST_STREAMS, is_number, shown
from megatron_mhc.kernels.defaults import BACKENDS, PRECISIONS
from megatron_mhc.kernels.numerics import NUMERICS


def require_mapping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | Sequence[Tensor],
    n: int,
    sinkhorn_iterations: int,
    norm_eps: float,
    precision: str,
) -> None:
    require_positive('num_streams', n, MOST_STREAMS)
    require_positive('sinkhorn_iterations', sinkhorn_iterations)
    factors = _factors(alpha)
    for name, tensor in (('x', x), ('weight', weight), ('bias', bias), *factors):
        require_float(name, tensor)
    if x.dim() < 1 or x.shape[-1] % n or not x.shape[-1]:
        raise ValueError(f'x: got shape {shape_of(x)}, wanted [..., n*C] with n = {n} streams')
    maps = n * n + 2 * n
    for name, tensor, wanted in (
        ('weight', weight, (maps, x.shape[-1])),
        ('bias', bias, (maps,)),
        *((name, factor, (3 // len(factors),)) for name, factor in factors),
    ):
        require_shape(name, tensor, wanted)
    require_same_device(x, weight=weight, bias=bias, **dict(factors))
    if not is_number(norm_eps) or not 0 <= norm_eps <= 1:
        raise ValueError(
            f'norm_eps: got {norm_eps!r}, wanted a number from 0 to 1 (it is added to a mean '
            'square; 1e-6 is common)'
        )
    if precision not in PRECISIONS:
        raise ValueError(f'precision: got {precision!r}, wanted one of {PRECISIONS}')
    if precision == 'bf16x2' and x.dtype != torch.bfloat16:
        raise ValueError(
            f"precision: got 'bf16x2' for {x.dtype} streams, wanted 'auto' (it needs bf16 streams)"
        )


def _factors(alpha: Tensor | Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The gating factors, one tensor or three, with their names."""
    if isinstance(alpha, torch.Tensor) or not isinstance(alpha, Sequence):
        return [('alpha', alpha)]
    if len(alpha) != 3:
        raise ValueError(f'alpha: got {len(alpha)} tensors, wanted one [3] or three [1]')
    return [(f'alpha[{place}]', factor) for place, factor in enumerate(alpha)]


def require_post_res(
    x: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    bias_name: str = 'bias',
) -> None:
    for name, tensor in (('x', x), ('y', y), ('h_post', h_post), ('h_res', h_res)):
        require_float(name, tensor)
    require_map('h_post', h_post)
    n = h_post.shape[-1]
    require_streams(x, 'h_post', h_post, (n,))
    require_streams(x, 'h_res', h_res, (n, n))
    require_shape('y', y, (*x.shape[:-1], x.shape[-1] // n))
    if bias is not None:
        require_float(bias_name, bias)
        require_shape(bias_name, bias, y.shape[-1:])
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f'dropout: got {dropout!r}, wanted a probability in [0, 1)')
    if seed is not None and not isinstance(seed, torch.Tensor):
        raise ValueError(f'seed: got {seed!r}, wanted a tensor, int64 [1]')
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (1,)):
        raise ValueError(f'seed: got {seed.dtype} {shape_of(seed)}, wanted int64 [1]')
    require_same_device(x, y=y, h_post=h_post, h_res=h_res, seed=seed, **{bias_name: bias})


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def require_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'backend: got {backend!r}, wanted one of {BACKENDS}')


def require_numerics(numerics: str) -> None:
    if not isinstance(numerics, str) or numerics not in NUMERICS:
        raise ValueError(f'numerics: got {numerics!r}, wanted one of {tuple(NUMERICS)}')


def require_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f'{name}: got {got}, wanted a floating-point tensor')


def require_positive(name: str, value: int, most: int = MOST_ITERATIONS) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f'{name}: got {shown(value)}, wanted an integer from 1 to {most}')


def require_map(name: str, maps: Tensor) -> None:
    if not maps.dim():
        raise ValueError(f'{name}: got shape [], wanted [..., n]')


def require_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f'{name}: got shape {shape_of(tensor)}, wanted {list(wanted)}')


def require_streams(x: Tensor, name: str, maps: Tensor, tail: tuple[int, ...]) -> None:
    n = tail[0] if tail else 0
    if not n or x.dim() < 1 or not x.shape[-1] or x.shape[-1] % n:
        raise ValueError(f'x: got shape {shape_of(x)}, wanted [..., n*C] with n = {n} from {name}')
    require_shape(name, maps, (*x.shape[:-1], *tail))


def require_same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f'{name}: got device {tensor.device}, wanted {x.device} like x')
