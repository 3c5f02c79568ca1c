"""The gated residual's module: the one of transformers, and its precision."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.residual.gated import GatedConnection, GatedMerge


@pytest.mark.parametrize('merges', [False, True], ids=['sublayer', 'merge'])
def test_equals_the_module_of_transformers(merges, random_seed):
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextGatedResidual

    sizes = {'hc_count': 4, 'hidden_size': 16, 'hc_lowrank': 5, 'rms_norm_eps': 1e-6}
    theirs = Qwen4ExpTextGatedResidual(SimpleNamespace(**sizes), use_combine=not merges)
    residual = ResidualConfig('gated', gated_rank=5)
    if merges:
        ours = gates = GatedMerge(16, residual, norm_eps=1e-6, std=1.0)
    else:
        ours = GatedConnection(16, residual, 0, norm_eps=1e-6, std=1.0)
        gates = ours.gates
    with torch.no_grad():
        theirs.hc_norm.weight.normal_()
        gates.gain.copy_(1 + theirs.hc_norm.weight)
        theirs.input_mix_weight_down.weight.copy_(gates.down.weight)
        theirs.input_mix_weight_up.weight.copy_(gates.up.weight)
        if not merges:
            theirs.block_inject_weight.weight.copy_(gates.write.weight)
    x = torch.randn(3, 2, 64)
    if merges:
        torch.testing.assert_close(ours(x), theirs(x))
        return
    u, carried = ours.read(x)
    wanted, _, injected = theirs(x)
    torch.testing.assert_close(u, wanted)
    torch.testing.assert_close(carried.h_post, injected)
    y = torch.randn(3, 2, 16)
    written = x + (y.unsqueeze(-2) * injected.unsqueeze(-1)).flatten(-2)
    torch.testing.assert_close(ours.post(y, carried), written)


def test_gates_stay_fp32_and_reads_have_the_type_of_the_streams(random_seed):
    connection = GatedConnection(16, ResidualConfig('gated', gated_rank=5), 0, std=1.0)
    x = torch.randn(3, 2, 64).bfloat16()
    (u, carried), (truth, wanted) = connection.read(x), connection.double().read(x.double())
    connection.bfloat16()
    assert u.dtype == torch.bfloat16 and carried.h_post.dtype == torch.float32
    torch.testing.assert_close(u, truth.bfloat16(), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(carried.h_post.double(), wanted.h_post, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['gated', 'attention'])
def test_no_other_layout_has_it(kind):
    from megatron_mhc.convert.saved_args import describe

    args = argparse.Namespace(residual_type=kind)
    source = SimpleNamespace(args=args, format='torch_dist', folder='iter_1')
    with pytest.raises(ValueError, match=f'of type {kind}, which no other layout has'):
        describe(source)
