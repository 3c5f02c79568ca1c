"""Gated residual (Qwen4-Exp): two starts, references, exact counts, refusals, training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from block_models import assert_follows, train
from test_gpt_model import MOE, SWIGLU

from megatron_mhc import ResidualConfig
from megatron_mhc.settings.flags_residual import same_structure
from megatron_mhc.settings.refusals import check_residual
from megatron_mhc.sizing.flops import residual_flops
from megatron_mhc.sizing.size import mapping_parameters, merge_parameters

GATED = {'residual_type': 'gated', 'gated_rank': 3}
PRENORM = {**GATED, 'gated_init': 'prenorm'}
RMS = {'normalization': 'RMSNorm'}
KINDS = {'dense': RMS, 'tied': {**RMS, 'tied': True}, 'swiglu': SWIGLU, 'moe': {**MOE, **RMS}}


@torch.no_grad()
def randomise(module):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(module.named_parameters()):
        if 'hyper_connection' in name or 'merge' in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize('kind', KINDS)
def test_prenorm_starts_as_the_plain_model(build, step, kind):
    plain, model = build(**KINDS[kind]), build(PRENORM, **KINDS[kind])
    base = dict(plain.named_parameters())
    shared = [name for name, p in model.named_parameters() if name in base]
    missing = [name for name in base if name not in shared]
    assert missing and all(name.endswith('norm.weight') for name in missing)
    wanted, got = step(plain), step(model)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    for name in shared:
        torch.testing.assert_close(got[1][name], wanted[1][name], rtol=1e-4, atol=1e-6, msg=name)
    # All learn from the first step but W_down, which waits for W_up, and streams come apart.
    for name, gradient in got[1].items():
        if name not in base:
            assert bool(gradient.abs().max() > 0) == ('down' not in name), name
    writes = got[1]['decoder.layers.0.self_attention_hyper_connection.gates.write.weight']
    assert not torch.allclose(writes[0], writes[1], rtol=1e-2)


def test_a_memory_starts_without_an_effect(build, step):
    engram = {'layers': (2,), 'heads': 2, 'table_size': 50, 'dim': 16}
    wanted, got = step(build(GATED, **RMS)), step(build(GATED, engram=engram, **RMS))
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in wanted[1].items())


def read(x, gates, n, norm_eps=1e-5):
    """The equations for one token at a time, each stream by itself."""
    hidden = x.shape[-1] // n
    gain = gates.gain.view(n, hidden)
    streams = x.unflatten(-1, (n, hidden))
    root = (streams**2).mean(-1, keepdim=True).add(norm_eps).sqrt()
    v = streams / root * gain
    flat = torch.cat([v[..., i, :] for i in range(n)], -1)
    inner = flat @ gates.down.weight.T / n
    inner = inner / (1 + torch.exp(-inner))
    weights = 1 / (1 + torch.exp(-(inner @ gates.up.weight.T)))
    u = sum(weights[..., i * hidden : (i + 1) * hidden] * v[..., i, :] for i in range(n)) / n
    if gates.write is None:
        return u
    return u, 2 / (1 + torch.exp(-(flat @ gates.write.weight.T) / n))


def reference_loss(model, tokens, n):
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    x = torch.cat([model.embedding(tokens[:, :-1], positions)] * n, -1)

    def sublayer(x, connection, function):
        u, post = read(x, connection.gates, n)
        y, bias = function(u)
        y = y if bias is None else y + bias
        return x + (post.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)

    for layer in model.decoder.layers:
        attention = layer.self_attention
        x = sublayer(x, layer.self_attention_hyper_connection, lambda u, f=attention: f(u, None))
        x = sublayer(x, layer.mlp_hyper_connection, layer.mlp)
    logits, _ = model.output_layer(read(x, model.decoder.stream_merge, n))
    return model.compute_language_model_loss(tokens[:, 1:].contiguous(), logits)


@pytest.mark.parametrize('n', [2, 3])
def test_model_follows_an_independent_reference(build, step, n):
    model = build({**GATED, 'num_residual_streams': n}, **RMS).double()
    randomise(model)
    assert_follows(model, step, lambda tokens: reference_loss(model, tokens, n))


def test_parameters_and_operations_are_counted_exactly(build):
    plain, model = build(**RMS), build(GATED, **RMS)
    residual = ResidualConfig(**GATED)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    own = 6 * mapping_parameters(residual, 32) + merge_parameters(residual, 32)
    # Seven norms are left out.
    assert added == own - 7 * 32
    wide, rank, n = 4 * 32, 3, 4
    read = 2 * (2 * wide * rank) + 2 * wide + 2 * wide
    assert residual_flops(residual, 32, 6) == 7 * read + 6 * (2 * wide * n + 2 * wide)


def test_fused_norms_are_left_out_and_unknown_ones_refused(megatron):
    """Transformer Engine has an identity where the norm would stand."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_mhc.residual.norms import norms_left_out

    for kind, sublayer, projection in (
        ('mamba', 'mixer', 'in_proj'),
        ('attention', 'self_attention', 'linear_qkv'),
        ('mlp', 'mlp', 'linear_fc1'),
    ):
        stock = getattr(mamba_stack_spec.submodules, f'{kind}_layer').submodules
        left_out = norms_left_out(stock)
        assert set(left_out) == {sublayer}
        parts = getattr(left_out[sublayer], 'keywords', vars(left_out[sublayer]))['submodules']
        assert getattr(parts, projection) is te.TEColumnParallelLinear
    submodules = get_gpt_layer_local_spec().submodules
    assert set(norms_left_out(submodules)) == {'input_layernorm', 'pre_mlp_layernorm'}
    submodules.pre_mlp_layernorm = IdentityOp
    with pytest.raises(ValueError, match='no pre_mlp_layernorm in front of its mlp'):
        norms_left_out(submodules)


LOCAL = '--residual-type gated --transformer-impl local '


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ('', 'add --normalization RMSNorm'),
        ('--normalization RMSNorm --fp32-residual-connection', 'fp32 streams'),
        ('--normalization RMSNorm --mhc-stream-merge mean', 'no effect with --residual-type gated'),
        ('--normalization RMSNorm --mhc-norm-eps 1e-6', 'no effect with --residual-type gated'),
        ('--normalization RMSNorm --gated-residual-rank 0', '--gated-residual-rank 0'),
        ('--normalization RMSNorm --gated-residual-bogus', '--gated-residual-bogus'),
    ],
)
def test_refused_in_one_line(refused, flags, said):
    assert said in refused(LOCAL + flags)


def test_flags_belong_to_it(parse, refused):
    parsed = parse(*(LOCAL + '--normalization RMSNorm').split())
    assert (parsed.gated_residual_rank, parsed.gated_residual_init) == (320, 'normal')
    assert parsed.mhc_num_residual_streams == 4 and parsed.mhc_stream_merge is None
    assert '--gated-residual-rank' in refused('--residual-type mhc --gated-residual-rank 8')
    with pytest.raises(ValueError, match='--normalization LayerNorm'):
        check_residual(SimpleNamespace(normalization='LayerNorm'), ResidualConfig('gated'))
    one, other = (ResidualConfig('gated', gated_rank=rank) for rank in (4, 5))
    assert not same_structure(one, other) and not same_structure(one, ResidualConfig('mhc'))


def test_trains_and_is_told_from_others(tmp_path, refused):
    """The loss falls, monitors say nothing bad, and the checkpoint is held to its rank."""
    train(
        tmp_path,
        '--normalization RMSNorm --residual-type gated --gated-residual-rank 4 --mhc-monitor '
        f'--tensorboard-dir {tmp_path}/tb',
    )
    same = f'{LOCAL}--normalization RMSNorm --load {tmp_path} --gated-residual-rank '
    line = refused(same + '5')
    assert 'gated_rank=4' in line and 'gated_rank=5' in line
    line = refused(f'--residual-type mhc --load {tmp_path}')
    assert 'residual_type=gated' in line and 'leave out --load' in line
