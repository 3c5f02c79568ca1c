"""What each layout computes from the same parameters, written apart from our own modules.

They agree but for small numbers, which no conversion can carry over:

==============  =====================  ===============  ====================================
layout          norm of the n*C values gates            H_res
==============  =====================  ===============  ====================================
mhc             --mhc-norm-eps         sigma, 2 sigma   columns, then rows
megatron-main   ``|v|/sqrt(nC) + e``   sigma, 2 sigma   rows, then columns; divisors >= e
megatron-dev    ``|v|/sqrt(nC) + e``   sigma+e, 2 sigma transposed: rows, then columns; + e
deepseek-v4     rms_norm_eps           sigma+e, 2 sigma transposed: rows, then columns; + e
hy4             rms_norm_eps           sigma+e,         I
                                       2 sigma + e
==============  =====================  ===============  ====================================

with e = 1e-6; ``mhc`` as ``--mhc-numerics paper`` has it, and otherwise as the layout of that name
does. ``glm-5.3`` and ``deepseek-v4.1`` compute as ``deepseek-v4``, ``megatron-bridge`` as dev. A
learned merge of the last three is sigma+e', with e' = e, or in dev the eps of the model's norms,
which is in the norm of the merge too. Megatron-LM's are those of August 2026; DeepSeek-V4's those
of its released code. In fp32, in which nothing of them is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.convert.layouts import Parameters, StoredLayout, Streams, to_tensors
from megatron_mhc.settings.residual import NORM_EPS, PAPER

EPS = 1e-6
TOKENS = 64
# Root mean squares of the streams of those tokens: the embedding's std, and what it grows to.
RMS = (0.02, 2.0)
OF = ('H_pre', 'H_post', 'H_res', 'merge')


def stored_parameters(
    get: Callable[[str], Any], layout: StoredLayout, layer: int | None, sublayer: int
) -> Parameters:
    """phi, b and the three alpha of one sublayer as ``layout`` stores them."""
    _, names = tuple(layout.sublayer_names(layer))[sublayer]
    return Parameters(get(names[0]), get(names[1]), torch.cat([get(name) for name in names[2:]]))


def computes_as(layout: StoredLayout, numerics: str = PAPER) -> str:
    """The name of the formula that ``layout`` computes; ``mhc`` is that of the paper.

    Args:
        numerics: ``--mhc-numerics``, which ``mhc`` alone has.
    """
    theirs = numerics if layout.name == 'mhc' else layout.numerics
    # They differ in the eps of the norm, the merge, and what they round.
    return {PAPER: 'mhc', 'glm-5.3': 'deepseek-v4'}.get(theirs, theirs)


def normalised(formula: str, x: Tensor, own_eps: float = NORM_EPS) -> Tensor:
    """``[..., n*C]`` divided by its root mean square; ``own_eps`` where it can be chosen."""
    square = x.square().mean(dim=-1, keepdim=True)
    if formula in ('megatron-main', 'megatron-dev'):
        return x / (square.sqrt() + EPS)
    return x * torch.rsqrt(square + own_eps)


def maps(
    layout: StoredLayout,
    x: Tensor,
    stored: Parameters,
    num_streams: int,
    iterations: int,
    own_eps: float = NORM_EPS,
    numerics: str = PAPER,
) -> tuple[Tensor, Tensor, Tensor]:
    """``h_pre [..., n]``, ``h_post [..., n]`` and ``h_res [..., n, n]``, which mixes as H x.

    Args:
        x: ``[..., n*C]`` streams in fp32.
        stored: phi, b and alpha in the layout's own order.
        own_eps: ``--mhc-norm-eps`` of ``mhc``, ``rms_norm_eps`` of those with a ``config.json``.
        numerics: ``--mhc-numerics`` of ``mhc``.
    """
    n, formula = num_streams, computes_as(layout, numerics)
    sizes = [n, n, len(stored.bias) - 2 * n]
    scale = stored.alpha.repeat_interleave(torch.tensor(sizes[: len(stored.alpha)]))
    logits = normalised(formula, x, own_eps) @ stored.phi.T * scale + stored.bias
    pre, post, res = logits.split(sizes, dim=-1)
    pre, post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
    if not sizes[-1]:
        eps = EPS if formula == 'hy4' else 0.0
        return pre + eps, post + eps, torch.eye(n).expand(*x.shape[:-1], n, n)
    res = res.unflatten(-1, (n, n))
    if formula == 'mhc':
        m = torch.exp(res - res.amax(dim=(-2, -1), keepdim=True))
        for _ in range(iterations):
            m = m / m.sum(-2, keepdim=True)
            m = m / m.sum(-1, keepdim=True)
        return pre, post, m
    if formula == 'megatron-main':
        m = torch.exp(res - res.amax(dim=-1, keepdim=True))
        for _ in range(iterations):
            m = m / m.sum(-1, keepdim=True).clamp(min=EPS)
            m = m / m.sum(-2, keepdim=True).clamp(min=EPS)
        return pre, post, m
    # Theirs is the transpose of what mixes, and so are their logits.
    m = torch.softmax(res if layout.transposed else res.mT, dim=-1) + EPS
    m = m / (m.sum(-2, keepdim=True) + EPS)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + EPS)
        m = m / (m.sum(-2, keepdim=True) + EPS)
    return pre + EPS, post, m.mT


def merge_gates(
    layout: StoredLayout,
    x: Tensor,
    head: Parameters | None,
    num_streams: int,
    norm_eps: float,
    own_eps: float = NORM_EPS,
    numerics: str = PAPER,
) -> Tensor:
    """Weights ``[..., n]`` of the streams in what the final norm gets.

    Args:
        norm_eps: eps of the model's norms, which Megatron's dev branch takes here too.
        own_eps, numerics: as for ``maps``.
    """
    if head is None:
        return torch.full((*x.shape[:-1], num_streams), 1 / num_streams)
    formula = computes_as(layout, numerics)
    eps = norm_eps if formula == 'megatron-dev' else own_eps
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    gates = torch.sigmoid(normed @ head.phi.T * head.alpha + head.bias)
    if formula == 'mhc':
        return gates
    return gates + (norm_eps if formula == 'megatron-dev' else EPS)


def differences(
    streams: Streams, first: StoredLayout, second: StoredLayout, norm_eps: float
) -> dict[str, float]:
    """The largest difference between the maps of two layouts of ``streams`` on random tokens.

    Args:
        streams: as ``first`` has them, but with the numerics of whichever of the two is ``mhc``.
        norm_eps: eps of the model's norms.
    """
    n, width = streams.num_streams, streams.num_streams * streams.hidden_size
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(RMS).log10().tolist()
    rms = torch.logspace(low, high, TOKENS)
    x = torch.randn(TOKENS, width, generator=generator) * rms[:, None]
    sides = [
        (layout, to_tensors(streams, layout, stacked=False), eps)
        for layout, eps in (
            (first, streams.norm_eps),
            (second, streams.norm_eps if second.name == 'mhc' or second.model_types else EPS),
        )
    ]
    largest = dict.fromkeys(OF, 0.0)

    def compare(name: str, a: Tensor, b: Tensor) -> None:
        largest[name] = max(largest[name], (a - b).abs().max().item())

    for layer in range(len(streams.layers)):
        for sublayer in range(2):
            both = [
                maps(layout, x, stored, n, streams.iterations, eps, streams.numerics)
                for layout, tensors, eps in sides
                for stored in (stored_parameters(tensors.get, layout, layer, sublayer),)
            ]
            for name, a, b in zip(OF, *both, strict=False):
                compare(name, a, b)
    gates = [
        merge_gates(layout, x, head, n, norm_eps, eps, streams.numerics)
        for layout, tensors, eps in sides
        for head in (stored_head(tensors.get, layout, tensors),)
    ]
    compare('merge', *gates)
    return largest


def stored_head(
    get: Callable[[str], Any], layout: StoredLayout, names: Container[str]
) -> Parameters | None:
    """The learned merge that ``layout`` stores; None where the mean is taken."""
    if layout.head is None or layout.head[0] not in names:
        return None
    return Parameters(*map(get, layout.head))
