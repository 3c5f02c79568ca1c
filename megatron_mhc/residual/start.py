"""Where the maps of mHC start (``--mhc-init``): the biases of a sublayer, and whether phi is 0."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc.manifolds.manifold import Manifold


class Start(NamedTuple):
    """Initial logits of H_pre and H_post: ``+value`` at the home stream, ``-value`` elsewhere.

    sigma(+-3) reads 0.95 of the home stream and 0.05 of each other one; 2 sigma(+-1) writes 1.46
    and 0.54, and 2 sigma(0) writes 1 to all.

    Args:
        pre: of H_pre.
        post: of H_post.
        res: the preset of the manifold that H_res is kept on.
        exact: phi = 0, and the reads of all streams sum to 1. With equal writes every stream then
            is that of a pre-norm residual network, until the first step.
        mean: H_pre is 1/n for every stream, by logits -ln(n - 1), and so is a learned merge (Hy4).
    """

    pre: float = 0.0
    post: float = 0.0
    res: str = 'uniform'
    exact: bool = False
    mean: bool = False

    def bias(self, home: int, manifold: Manifold) -> Tensor:
        """Logits of pre | post | res, ``[2n + K]`` fp32, of a sublayer with this home stream."""
        n = manifold.n
        sign = torch.full((n,), -1.0, device='cpu')
        sign[home] = 1.0
        pre = self.pre * sign
        if self.exact and n > 1:
            elsewhere = torch.arange(n, device='cpu') != home
            pre[elsewhere] = torch.logit((1 - pre[home].sigmoid()) / (n - 1))
        if self.mean:
            pre = torch.full((n,), mean_logit(n), device='cpu')
        return torch.cat([pre, self.post * sign, manifold.bias(self.res)])


def mean_logit(n: int) -> float:
    """The logit at which sigma is 1/n; for one stream 0, as Hy4 has it."""
    return -math.log(max(n - 1, 1))


STARTS = {
    # Streams differ from the first sublayer on; while they are equal, H_res gets no gradient.
    'identity': Start(pre=3.0, post=1.0, res='identity'),
    'uniform': Start(),
    'equal-writes': Start(pre=3.0, res='identity'),
    'prenorm': Start(pre=3.0, res='identity', exact=True),
    'mean-reads': Start(res='identity', mean=True),
}
