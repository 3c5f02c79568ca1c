"""Streams for a standard model under which it computes what it did: exact at step 0.

The streams start as n copies of the embedding, and stay equal as long as each row of H_res sums to
1 and H_post is 1 on all of them. A sublayer then reads its old input if H_pre sums to 1, and the
mean of the streams is the old hidden state.

Equal streams with equal reads would have equal gradients, and stay n copies for ever. So each
sublayer reads mostly one of them, its home: the sums are the same, the gradients are not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mhc.convert.layouts import (
    SINKHORN,
    Parameters,
    StoredLayout,
    Streams,
    mean_as_head,
)
from megatron_mhc.inputs.values import (
    MOST_FACTOR,
    MOST_ITERATIONS,
    MOST_STREAMS,
    check_integer,
    check_number,
)
from megatron_mhc.manifolds.sinkhorn import IDENTITY
from megatron_mhc.settings.residual import LEAST_NORM_EPS, NORM_EPS

# What fp32 still tells from 0.
LEAST_FACTOR = 1e-30
# Share of its home stream in what a sublayer reads; the others have the rest.
HOME_SHARE = 0.75


def upcycled(
    num_layers: int,
    hidden_size: int,
    *,
    sublayers: int = 2,
    num_streams: int = 4,
    iterations: int = 20,
    init_gating_factor: float = 0.01,
    stream_merge: str = 'mean',
    norm_eps: float = NORM_EPS,
    noise: float = 0.0,
    seed: int = 1234,
) -> Streams:
    """The mapping parameters of a standard model of ``num_layers`` layers.

    phi = 0 makes every map its bias: b_post = 0 is H_post = 1, b_res = 6 I a doubly stochastic
    matrix near I, and b_pre has sigma(b_pre) sum to 1. alpha is not 0, so that phi has a gradient
    from the first step on (HC, arXiv 2409.19606, section 3.1, starts its dynamic part likewise).

    Args:
        sublayers: of each layer; 1 in a hybrid model.
        num_streams: n >= 2; iterations: passes of Sinkhorn-Knopp.
        init_gating_factor: alpha > 0.
        stream_merge: ``mean``, or ``learned`` with the gates of the mean.
        norm_eps: of the norm of all streams, which phi = 0 takes out of the maps of step 0.
        noise: std of a normal draw added to all biases; not exact then.
        seed: of that draw.

    Raises:
        ValueError: a value under which no exact form exists, or none that trains.
    """
    n = num_streams
    _check(n, iterations, init_gating_factor, stream_merge, norm_eps, noise)

    def parameters(sublayer: int) -> Parameters:
        phi = torch.zeros(n * n + 2 * n, n * hidden_size)
        bias = _bias(n, sublayer, noise, seed)
        return Parameters(phi, bias, torch.full((3,), init_gating_factor))

    layers = tuple(
        tuple(parameters(sublayers * layer + i) for i in range(sublayers))
        for layer in range(num_layers)
    )
    head = None
    if stream_merge == 'learned':
        head = mean_as_head(n, hidden_size)._replace(alpha=torch.full((1,), init_gating_factor))
    return Streams(n, hidden_size, iterations, layers, head, norm_eps)


def of_kind(streams: Streams, layout: StoredLayout) -> Streams:
    """The streams that ``upcycled`` made, as a layout of another kind has them; as exact there.

    In a single pass the first read is of one of equal streams, and every H_pre sums to 1. Where
    H_res is I there are no logits of it.
    """
    streams = replace(streams, single_pass=layout.single_pass, manifold=layout.manifold)
    if layout.manifold == SINKHORN:
        return streams
    rows, gates = 2 * streams.num_streams, layout.num_alpha
    layers = tuple(
        tuple(Parameters(p.phi[:rows], p.bias[:rows], p.alpha[:gates]) for p in layer)
        for layer in streams.layers
    )
    return replace(streams, layers=layers)


def _check(
    num_streams: int,
    iterations: int,
    init_gating_factor: float,
    stream_merge: str,
    norm_eps: float,
    noise: float,
) -> None:
    check_integer(
        *('--mhc-num-residual-streams', num_streams, 2, MOST_STREAMS),
        'one stream has nothing to mix, and H_pre = sigma(b) is 1 only where its gradient is gone; '
        'choose 2 or more',
    )
    check_integer('--mhc-sinkhorn-iterations', iterations, 1, MOST_ITERATIONS, 'mHC has 20')
    check_number(
        *('--mhc-init-gating-factor', init_gating_factor, LEAST_FACTOR, MOST_FACTOR),
        'phi starts at 0, so with alpha = 0 neither would ever get a gradient; choose a number > 0 '
        '(both papers: 0.01)',
    )
    check_number('--mhc-norm-eps', norm_eps, LEAST_NORM_EPS, 1.0, 'DeepSeek-V4 has 1e-6')
    if stream_merge not in ('mean', 'learned'):
        raise ValueError(
            f'--mhc-stream-merge {stream_merge}: n equal streams sum to n times the hidden state, '
            'which the final norm undoes only up to its eps, so the model would change; choose '
            'mean or learned'
        )
    check_number('--break-symmetry', noise, 0, MOST_FACTOR, 'a standard deviation such as 0.1')


def _bias(n: int, sublayer: int, noise: float, seed: int) -> torch.Tensor:
    """[n^2 + 2n]: the maps of step 0."""
    pre = torch.full((n,), (1 - HOME_SHARE) / (n - 1))
    pre[sublayer % n] = HOME_SHARE
    bias = torch.cat([pre.logit(), torch.zeros(n), IDENTITY * torch.eye(n).flatten()])
    if noise:
        generator = torch.Generator().manual_seed((seed << 20) + sublayer)
        bias += noise * torch.randn(bias.shape, generator=generator)
    return bias
