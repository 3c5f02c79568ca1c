"""What the monitors measure of a sublayer's maps and streams: pure functions of sampled tokens.

Legend: S sublayers, K tokens, n streams. Every metric is a number per token; what is logged is its
mean over the tokens, as mHC, section 3.1 has it, or its largest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The resolution of fp32 at 1: 1.2e-7.
EPS = torch.finfo(torch.float32).eps


class Sample(NamedTuple):
    """Maps and streams of some tokens, fp32: of one sublayer, or of S of them stacked.

    Args:
        h_pre: ``[..., K, n]``.
        h_post: ``[..., K, n]``.
        h_res: ``[..., K, n, n]``.
        gram: ``[..., K, n, n]``, the inner product of streams i and j, divided by C.
        output: ``[..., K]``, the mean square of the sublayer's output.
        logits: ``[..., K, M]``, what H_res is the projection of; M = 0 where it is of none.
        logit_gradient: the same shape, the gradient of the loss; 0 where none flowed back.
    """

    h_pre: Tensor
    h_post: Tensor
    h_res: Tensor
    gram: Tensor
    output: Tensor
    logits: Tensor
    logit_gradient: Tensor


def gain_forward(h_res: Tensor) -> Tensor:
    """Amax gain magnitude of the signal: ``max_i sum_j |H[i, j]|`` (mHC, section 3.1)."""
    return h_res.abs().sum(-1).amax(-1)


def gain_backward(h_res: Tensor) -> Tensor:
    """Amax gain magnitude of the gradient: ``max_j sum_i |H[i, j]|``."""
    return h_res.abs().sum(-2).amax(-1)


def composites(h_res: Tensor) -> Tensor:
    """``H[L-1] ... H[l]`` for every l: what the skip path makes of streams l (mHC, Eq 4).

    Args:
        h_res: ``[L, ..., n, n]``, in the order of the sublayers.
    """
    product, products = None, []
    for single in h_res.flip(0):
        product = single if product is None else product @ single
        products.append(product)
    return torch.stack(products[::-1])


def off_diagonal_mass(h_res: Tensor) -> Tensor:
    """Share of a stream that comes from other streams: mean over rows of ``sum_{j != i} |H|``."""
    diagonal = h_res.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    return (h_res.abs().sum((-2, -1)) - diagonal) / h_res.shape[-1]


def entropy(weights: Tensor) -> Tensor:
    """How evenly ``|weights|`` lie on the n streams: 1 equal on all, 0 all on one."""
    n = weights.shape[-1]
    if n == 1:
        return torch.zeros_like(weights[..., 0])
    share = weights.abs() / weights.abs().sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1) / math.log(n)


def similarity(gram: Tensor) -> Tensor:
    """Mean cosine between two different streams; 1 means that the streams have collapsed."""
    n = gram.shape[-1]
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = gram / (norm.unsqueeze(-1) * norm.unsqueeze(-2))
    return (cosine.sum((-2, -1)) - n) / max(1, n * (n - 1))


def effective_rank(gram: Tensor) -> Tensor:
    """How many streams there are in effect: 1 where all are multiples of one, n where orthogonal.

    exp of the entropy of the eigenvalues of the Gram matrix (squared singular values of the
    streams), as shares of their sum; n takes equal norms as well. Not of their roots, which would
    turn the rounding of equal streams, 1e-7, into 3e-4.
    """
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    # LAPACK refuses NaN. A matrix of zeros has no shares, which gives it back.
    values = torch.linalg.eigvalsh(gram.double().masked_fill(~finite, 0)).clamp(min=0)
    share = values / values.sum(-1, keepdim=True)
    return (-torch.xlogy(share, share).sum(-1)).exp()


def write_share(sample: Sample) -> Tensor:
    """``|H_post^T y| / (|H_post^T y| + |H_res x|)``, norms of all streams: 0 adds nothing."""
    added = sample.h_post.square().sum(-1).sqrt() * sample.output.sqrt()
    kept = ((sample.h_res @ sample.gram) * sample.h_res).sum((-2, -1)).clamp(min=0).sqrt()
    return added / (added + kept)


def saturated(h_res: Tensor) -> Tensor:
    """Share of rows whose entries sum to EPS or less beside the largest one.

    Such a row is a corner of the simplex, to fp32. Any differentiable map onto the simplex has
    derivative 0 there, since no direction and its opposite both lead inside: whatever the loss,
    nothing of the row's gradient reaches the logits. Under Sinkhorn-Knopp these then lie 16 or more
    below what would take part.
    """
    others = h_res.sort(-1).values[..., :-1].sum(-1)
    return (others <= EPS).to(h_res.dtype).mean(-1)


def _magnitude(values: Tensor) -> Tensor:
    """The largest ``|value|``; minus infinity where there are none."""
    least = values.new_full((*values.shape[:-1], 1), -math.inf)
    return torch.cat([values.abs(), least], -1).amax(-1)


def _rms(sample: Sample) -> Tensor:
    return sample.gram.diagonal(dim1=-2, dim2=-1).sqrt()


# name -> value per token, of which the mean is logged
MEANS: dict[str, Callable[[Sample], Tensor]] = {
    'amax-gain-forward': lambda s: gain_forward(s.h_res),
    'amax-gain-backward': lambda s: gain_backward(s.h_res),
    'row-sum-error': lambda s: (s.h_res.sum(-1) - 1).abs().amax(-1),
    'column-sum-error': lambda s: (s.h_res.sum(-2) - 1).abs().amax(-1),
    'res-offdiag-mean': lambda s: off_diagonal_mass(s.h_res),
    'pre-entropy': lambda s: entropy(s.h_pre),
    'post-entropy': lambda s: entropy(s.h_post),
    'stream-rms': lambda s: _rms(s).mean(-1),
    'stream-norm-ratio': lambda s: _rms(s).amin(-1) / _rms(s).amax(-1),
    'stream-similarity': lambda s: similarity(s.gram),
    'stream-effective-rank': lambda s: effective_rank(s.gram),
    'write-share': write_share,
    'res-saturated': lambda s: saturated(s.h_res),
}
COMPOSITE_MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    'amax-composite-gain-forward': gain_forward,
    'amax-composite-gain-backward': gain_backward,
}
# name -> value per token, of which the largest is logged; a minimum is minus the largest of minus
MAXIMA: dict[str, Callable[[Sample], Tensor]] = {
    'pre-max': lambda s: s.h_pre.amax(-1),
    'post-max': lambda s: s.h_post.amax(-1),
    'pre-min': lambda s: -s.h_pre.amin(-1),
    'post-min': lambda s: -s.h_post.amin(-1),
    'res-logit-max': lambda s: _magnitude(s.logits),
    'res-logit-grad-max': lambda s: _magnitude(s.logit_gradient),
}
MINIMA = ('pre-min', 'post-min')
# What there is only of an H_res that is the projection of logits.
OF_LOGITS = ('res-logit-max', 'res-logit-grad-max', 'res-saturated')
# How the sublayers' values become the one that is always logged; a mean where not listed.
OVER_SUBLAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(('amax-gain-forward', 'amax-gain-backward', *COMPOSITE_MEANS), torch.max),
    **dict.fromkeys(('row-sum-error', 'column-sum-error', 'pre-max', 'post-max'), torch.max),
    **dict.fromkeys(('pre-min', 'post-min', 'stream-norm-ratio'), torch.min),
    **dict.fromkeys(OF_LOGITS, torch.max),
    'mapping-grad-norm': torch.linalg.vector_norm,
    **dict.fromkeys(('nonfinite-streams', 'nonfinite-maps', 'nonfinite-outputs'), torch.sum),
}


def sums(sample: Sample, composite: Tensor) -> Tensor:
    """Sums over the tokens, to be divided by their number: ``[S, columns]``, fp64.

    The columns are those of MEANS, of COMPOSITE_MEANS, then H_res and the composite themselves.
    """
    columns = [measure(sample) for measure in MEANS.values()]
    columns += [measure(composite) for measure in COMPOSITE_MEANS.values()]
    whole = [torch.stack(columns, -1), sample.h_res.flatten(-2), composite.flatten(-2)]
    return torch.cat([part.double().sum(1) for part in whole], -1)


def maxima(sample: Sample) -> Tensor:
    """Largest values over the tokens: ``[S, columns]`` in the order of MAXIMA, fp64."""
    return torch.stack([measure(sample).amax(1) for measure in MAXIMA.values()], -1).double()
