"""The maps and the mix under the conventions of other projects (``kernels/numerics.py``).

The backward of what saves much runs the forward again, as theirs do: of a token's maps only the
logits, or the streams, are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_mhc.kernels.numerics import NUMERICS, PAPER, Numerics
from megatron_mhc.kernels.reference.dropout import dropout_scale_ref
from megatron_mhc.kernels.reference.mapping import mapping_ref, scaled_projection_ref
from megatron_mhc.kernels.reference.precision import at_least_fp32, without_autocast
from megatron_mhc.kernels.reference.sinkhorn import sinkhorn_ref
from megatron_mhc.kernels.reference.streams import post_res_ref, pre_ref

COLUMNS, ROWS = -2, -1
Maps = tuple[Tensor, Tensor, Tensor]


def sinkhorn_as(logits: Tensor, iterations: int, numerics: str = PAPER) -> Tensor:
    """``sinkhorn_ref`` under the conventions ``numerics``: ``[..., n, n]``, at least fp32."""
    rules = NUMERICS[numerics]
    if rules.sinkhorn == 'exact':
        return sinkhorn_ref(logits, iterations)
    with without_autocast(logits.device):
        wide = at_least_fp32(logits)
        (h_res,) = _replayed(lambda m: _sinkhorn(m, iterations, rules), wide)
        return h_res


def _sinkhorn(logits: Tensor, iterations: int, rules: Numerics) -> Tensor:
    eps = rules.eps
    if rules.sinkhorn == 'clamped':
        # Rows first, columns last. The shift of a row cancels in the first division.
        m = (logits - logits.amax(ROWS, keepdim=True).detach()).exp()
        for _ in range(iterations):
            m = m / m.sum(ROWS, keepdim=True).clamp(min=eps)
            m = m / m.sum(COLUMNS, keepdim=True).clamp(min=eps)
        return m
    # A softmax is the first pass over columns; eps in every sum, and once in the matrix.
    m = logits.softmax(COLUMNS) + eps
    m = m / (m.sum(ROWS, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(COLUMNS, keepdim=True) + eps)
        m = m / (m.sum(ROWS, keepdim=True) + eps)
    return m


def mapping_as(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_streams: int,
    sinkhorn_iterations: int,
    norm_eps: float,
    numerics: str = PAPER,
) -> Maps:
    """``mapping_ref`` under the conventions ``numerics``; arguments and results as there.

    What they round to the dtype of the streams has values of that dtype, in fp32.
    """
    n, rules = num_streams, NUMERICS[numerics]
    if numerics == PAPER:
        return mapping_ref(
            *(x, weight, bias, alpha),
            num_streams=n,
            sinkhorn_iterations=sinkhorn_iterations,
            norm_eps=norm_eps,
        )
    dtype = x.dtype if rules.narrow else torch.promote_types(x.dtype, torch.float32)
    sizes = [n, n, n * n]

    def outside(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Maps with eps beside the root; where ``narrow``, rounded after each of their steps."""
        v, phi, b, factors = (tensor.to(dtype) for tensor in tensors)
        h = torch.nn.functional.linear(v, phi)
        # Its gradient at 0 is 0, that of the root of a mean square is none.
        root = torch.linalg.vector_norm(at_least_fp32(v), dim=-1, keepdim=True)
        # A sum of squares beyond fp32: h / inf would pass for maps of the biases alone.
        root = root.masked_fill(root.isinf(), torch.nan) / math.sqrt(v.shape[-1])
        r = (1 / (root + norm_eps)).to(dtype)
        h, r, b, factors = (at_least_fp32(t) for t in (h, r, b, factors))
        logits = r * h * _each(factors, sizes) + b
        pre, post, res = logits.split(sizes, dim=-1)
        res = _sinkhorn(res.unflatten(-1, (n, n)).to(dtype), sinkhorn_iterations, rules)
        pre, post = gates_as(pre, post, numerics)
        return tuple(at_least_fp32(m.to(dtype)) for m in (pre, post, res))

    with without_autocast(x.device):
        if rules.norm_outside:
            pre, post, res = _replayed(outside, x, weight, bias, alpha)
        else:
            logits = scaled_projection_ref(x, weight, bias, _each(alpha, sizes), norm_eps)
            pre, post, res = logits.split(sizes, dim=-1)
            pre, post = gates_as(pre, post, numerics)
            res = sinkhorn_as(res.unflatten(-1, (n, n)), sinkhorn_iterations, numerics)
        maps = {'pre': pre, 'post': post, 'res': res}
        for name in rules.rounded:
            maps[name] = maps[name].to(x.dtype).to(maps[name].dtype)
    return maps['pre'], maps['post'], maps['res']


def gates_as(pre: Tensor, post: Tensor, numerics: str = PAPER) -> tuple[Tensor, Tensor]:
    """H_pre and H_post of their logits ``[..., n]``, under the conventions ``numerics``."""
    rules = NUMERICS[numerics]
    h_pre, h_post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
    if rules.pre_eps:
        h_pre = h_pre + rules.pre_eps
    return h_pre, h_post + rules.post_eps if rules.post_eps else h_post


def _each(factors: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([a.expand(size) for a, size in zip(factors, sizes, strict=True)])


def merge_gates_as(logits: Tensor, model_eps: float, numerics: str = PAPER) -> Tensor:
    """The weights of the streams in a learned merge, of its logits ``[..., n]``.

    Args:
        model_eps: of the model's norms.
    """
    eps = NUMERICS[numerics].merge_eps
    gates = torch.sigmoid(logits)
    return gates + (model_eps if eps == 'model' else float(eps)) if eps else gates


def post_res_as(
    x: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    numerics: str = PAPER,
) -> Tensor:
    """``post_res_ref`` under the conventions ``numerics``; arguments and result as there.

    Where the mix is rounded, H_res x, H_post y, H_post bias and the sum of the latter two each are
    of the dtype of x before the next is added; sums over streams stay in fp32.
    """
    if not NUMERICS[numerics].mix_rounds:
        return post_res_ref(x, y, h_post, h_res, bias, dropout, seed)
    with without_autocast(x.device):
        mixed = torch.cat([pre_ref(x, row) for row in h_res.unbind(-2)], dim=-1)

        def spread(values: Tensor) -> Tensor:
            """``h_post[i] * values``, ``[..., n, C]``."""
            wide = at_least_fp32(values.to(x.dtype)).unsqueeze(-2)
            return (h_post.to(wide.dtype).unsqueeze(-1) * wide).to(x.dtype)

        written = spread(y)
        if bias is not None:
            written = written + spread(bias)
        if dropout > 0:
            if seed is None:
                raise ValueError('seed: None, but dropout > 0 needs one; give [1] int64')
            scale = dropout_scale_ref(y.numel() // y.shape[-1], y.shape[-1], dropout, seed)
            written = (at_least_fp32(written) * scale.view(y.shape).unsqueeze(-2)).to(x.dtype)
        return mixed + written.flatten(-2)


def _replayed(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """What ``function`` makes of ``tensors``, of which backward runs it again."""
    made: tuple[Tensor, ...] = _Replayed.apply(function, *tensors)
    return made


class _Replayed(Function):
    """Saves the arguments alone."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.function = function
        made = function(*tensors)
        return made if isinstance(made, tuple) else (made,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, needed, strict=True)
            leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in pairs]
            made = ctx.function(*leaves)
            made = made if isinstance(made, tuple) else (made,)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(made, wanted, grads))
        return None, *(next(found) if wanted else None for wanted in needed)
