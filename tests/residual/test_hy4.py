"""Hy4's hyper-connections (iHC) are mHC on the manifold `identity` with a start of their own."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.residual.stream_merge import StreamMerge

N, HIDDEN = 4, 16
HY4 = ResidualConfig(
    num_residual_streams=N, manifold='identity', stream_merge='learned', init='mean-reads'
)


def test_equals_the_modules_of_transformers(random_seed):
    """With their eps of 1e-6 on every gate, to that; without it to rounding."""
    from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead

    ours, merge = ManifoldHyperConnection(HIDDEN, HY4, 0), StreamMerge(HIDDEN, HY4)
    x, y = torch.randn(2, 3, N, HIDDEN), torch.randn(2, 3, HIDDEN)
    with torch.no_grad():
        for parameter in (*ours.parameters(), *merge.parameters()):
            parameter.add_(torch.randn_like(parameter))
    for eps, limits in ((0.0, {}), (1e-6, {'rtol': 2e-5, 'atol': 2e-5})):
        sizes = {'hc_mult': N, 'hc_eps': eps, 'hidden_size': HIDDEN, 'hc_magnitude': 2.0}
        config = SimpleNamespace(rms_norm_eps=1e-6, **sizes)
        theirs, head = HYV4HyperConnection(config), HYV4HyperHead(config)
        with torch.no_grad():
            theirs.fn.copy_(ours.mapping_proj.weight)
            theirs.base.copy_(ours.bias)
            theirs.scale.copy_(torch.cat([ours.alpha_pre, ours.alpha_post]))
            head.hc_fn.copy_(merge.mapping_proj.weight)
            head.hc_base.copy_(merge.bias)
            head.hc_scale.copy_(merge.alpha)
        post, read = theirs(x)
        u, carried = ours.read(x.flatten(-2))
        torch.testing.assert_close(u, read, **limits)
        written = (post.unsqueeze(-1) * y.unsqueeze(-2) + x).flatten(-2)
        torch.testing.assert_close(ours.post(y, carried), written, **limits)
        torch.testing.assert_close(merge(x.flatten(-2)), head(x), **limits)


def test_starts_with_means():
    settings = {'init_gating_factor': 0.0, 'manifold': 'identity', 'init': 'mean-reads'}
    for n in (1, 2, 4):
        residual = ResidualConfig(num_residual_streams=n, stream_merge='learned', **settings)
        module, merge = ManifoldHyperConnection(HIDDEN, residual, 3), StreamMerge(HIDDEN, residual)
        x = torch.randn(5, n * HIDDEN)
        pre, post, res = module.maps(x)
        # For one stream the logit is 0, as theirs.
        share = 1 / n if n > 1 else 0.5
        torch.testing.assert_close(pre, torch.full((5, n), share))
        assert torch.equal(post, torch.ones(5, n)) and torch.equal(res, torch.eye(n).expand_as(res))
        mean = x.unflatten(-1, (n, HIDDEN)).sum(-2) * share
        torch.testing.assert_close(merge(x), mean)
