"""The modelling file follows ``--mhc-numerics`` as our own modules do, in fp32 and in bf16."""

from __future__ import annotations

import pytest
import torch

from megatron_mhc.convert.hf import modeling_megatron_mhc as theirs
from megatron_mhc.kernels.numerics import NUMERICS
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.residual.stream_merge import StreamMerge
from megatron_mhc.settings.residual import ResidualConfig

C, N, MODEL_EPS = 12, 4, 1e-3


def both(name: str, peaked: float):
    """Ours and the file's, of one sublayer and of the merge, with the same random weights."""
    manifold = NUMERICS[name].manifold
    residual = ResidualConfig(numerics=name, manifold=manifold, kernel_backend='torch')
    config = theirs.MegatronMhcConfig(
        hidden_size=C,
        norm_eps=MODEL_EPS,
        numerics=name,
        manifold=manifold,
        stream_merge=residual.stream_merge,
        residual_norm_eps=residual.norm_eps,
    )
    ours = ManifoldHyperConnection(C, residual, 0), StreamMerge(C, residual, model_eps=MODEL_EPS)
    file = theirs.HyperConnection(config), theirs.StreamMerge(config)
    with torch.no_grad():
        for parameter in (p for module in ours for p in module.parameters()):
            parameter.normal_()
        ours[0].bias[2 * N :] *= peaked
        for module, other in zip(ours, file, strict=True):
            other.load_state_dict(module.state_dict())
    return *ours, *file


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', NUMERICS)
@torch.no_grad()
def test_a_sublayer_and_the_merge_are_ours(name, dtype, random_seed):
    own, own_merge, file, file_merge = both(name, peaked=4.0)
    x = (torch.randn(3, 7, N * C) * torch.logspace(-4, 0, 7)[:, None]).to(dtype)
    y = torch.randn(3, 7, C).to(dtype)
    h_pre, h_post, h_res = own.all_maps(x)
    maps = file(x)
    _, u, carried = own(x)
    # A bf16 map may fall on the other side of a tie; then what is read and written, too.
    wide = 2e-5 if dtype == torch.float32 else 2**-7
    narrow = wide if NUMERICS[name].rounded or NUMERICS[name].narrow else 2e-5
    for a, b in zip((h_pre, h_post, h_res), maps, strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=narrow, atol=narrow)
    torch.testing.assert_close(theirs.read(x, maps[0]), u, rtol=wide, atol=wide)
    rounds = NUMERICS[name].mix_rounds
    written = theirs.write(x, y, *maps[1:], rounds)
    torch.testing.assert_close(written, own.post(y, carried), rtol=wide, atol=wide)
    if rounds and dtype == torch.bfloat16:
        wanted = own.post(y, carried)
        off, plain = (
            (theirs.write(x, y, h_post, h_res, how) != wanted).float().mean()
            for how in (True, False)
        )
        # fp32 sums in another order, next to a tie; one rounding in place of three.
        assert off < 0.02 and plain > 0.1
    if own_merge.residual.stream_merge == 'learned':
        merged = file_merge(x, None)
        torch.testing.assert_close(merged, own_merge(x), rtol=wide, atol=wide)


@pytest.mark.parametrize('name', NUMERICS)
@torch.no_grad()
def test_each_eps_is_there(name, random_seed):
    """phi = 0 leaves the biases alone, so that fp32 shows an eps of 1e-6."""
    own, own_merge, file, file_merge = both(name, peaked=1.0)
    for module in (own, file):
        module.mapping_proj.weight.zero_()
    x = torch.randn(1, 1, N * C)
    for a, b in zip(own.all_maps(x), file(x), strict=True):
        assert (a - b).abs().max() < 4e-7
    rules = NUMERICS[name]
    apart = file(x)[0] - file.bias[:N].sigmoid()
    assert (apart - rules.pre_eps).abs().max() < 2e-7
    apart = file(x)[1] - 2 * file.bias[N : 2 * N].sigmoid()
    assert (apart - rules.post_eps).abs().max() < 4e-7
    rows = file(x)[2].sum(-1) - 1
    # With eps in every sum no row sums to 1, and with the paper's order each does.
    assert (rows.abs().max() < 3e-7) == (rules.sinkhorn == 'exact') or rules.sinkhorn == 'clamped'
    if rules.merge == 'learned':
        for module in (own_merge, file_merge):
            module.mapping_proj.weight.zero_()
            module.bias.fill_(-30.0)
        gates = MODEL_EPS if rules.merge_eps == 'model' else rules.merge_eps
        wanted = gates * x.unflatten(-1, (N, C)).sum(-2)
        for merged in (own_merge(x), file_merge(x, None)):
            torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-10)
