"""Attention Residuals by blocks: the start, a reference, exact counts, refusals, training."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from block_models import assert_follows, train
from test_gpt_model import MOE, SWIGLU

from megatron_mhc import ResidualConfig
from megatron_mhc.residual.attention import BlockAttention, attend
from megatron_mhc.settings.flags_residual import same_structure
from megatron_mhc.settings.refusals import check_residual
from megatron_mhc.sizing.flops import residual_flops
from megatron_mhc.sizing.size import mapping_parameters, merge_parameters

# Norms then know no scale, and the mean of all sums is their sum.
NO_EPS = {'layernorm_epsilon': 1e-20}
KINDS = {'dense': {}, 'tied': {'tied': True}, 'swiglu': SWIGLU, 'moe': MOE}


def blocks_of(size):
    return {'residual_type': 'attention', 'attention_block_size': size}


@torch.no_grad()
def randomise(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith('query'):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [1, 4])
def test_starts_as_the_plain_model(build, step, kind, size):
    """With equal weights a sublayer reads the mean of what adds up to the plain hidden state."""
    settings = {**KINDS[kind], **NO_EPS}
    plain, model = build(**settings), build(blocks_of(size), **settings)
    wanted, got = step(plain), step(model)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    queries = {name: got[1][name] for name in got[1] if name not in wanted[1]}
    assert len(queries) == 7
    first = 'decoder.layers.0.self_attention_hyper_connection.reader.query'
    for name, gradient in queries.items():
        # The first sublayer has one source.
        assert bool(gradient.abs().max() > 0) == (name != first), name


def reference_loss(model, tokens, size):
    """The equations, with a list of sums, all sources of a read at once."""
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    sums, done = [model.embedding(tokens[:, :-1], positions)], 0

    def read(query):
        stacked = torch.stack(sums)
        keys = stacked / (stacked**2).mean(-1, keepdim=True).add(1e-5).sqrt()
        weights = torch.einsum('c,jsbc->jsb', query, keys).softmax(0)
        return torch.einsum('jsb,jsbc->sbc', weights, stacked)

    for layer in model.decoder.layers:
        for connection, norm, function in (
            (
                layer.self_attention_hyper_connection,
                layer.input_layernorm,
                lambda u, attention=layer.self_attention: attention(u, None),
            ),
            (layer.mlp_hyper_connection, layer.pre_mlp_layernorm, layer.mlp),
        ):
            y, bias = function(norm(read(connection.reader.query)))
            y = y if bias is None else y + bias
            if done % size == 0:
                sums.append(y)
            else:
                sums[-1] = sums[-1] + y
            done += 1
    # Not through the module, whose hook would read again.
    norm, hidden = model.decoder.final_layernorm, read(model.decoder.stream_merge.query)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, 1e-5)
    logits, _ = model.output_layer(hidden)
    return model.compute_language_model_loss(tokens[:, 1:].contiguous(), logits)


@pytest.mark.parametrize('size', [1, 2, 5, 24])
def test_model_follows_an_independent_reference(build, step, size):
    model = build(blocks_of(size)).double()
    randomise(model)
    assert_follows(model, step, lambda tokens: reference_loss(model, tokens, size))


def test_reads_add_up_in_fp32_and_have_the_type_of_the_sums(random_seed):
    query, sums = torch.randn(16), [torch.randn(3, 2, 16).bfloat16() for _ in range(3)]
    (u,) = attend(query, *sums, norm_eps=1e-5)
    (truth,) = attend(query.double(), *(x.double() for x in sums), norm_eps=1e-5)
    assert u.dtype == torch.bfloat16
    torch.testing.assert_close(u, truth.bfloat16(), rtol=2**-8, atol=1e-6)
    connection = BlockAttention(16, ResidualConfig('attention'), 3, sublayers=6).bfloat16()
    assert connection.reader.query.dtype == torch.float32


def test_parameters_and_operations_are_counted_exactly(build):
    plain, model = build(), build(blocks_of(4))
    residual = ResidualConfig(**blocks_of(4))
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 6 * mapping_parameters(residual, 32) + merge_parameters(residual, 32) == 7 * 32
    # Sources of six sublayers and the output layer.
    sources = 1 + 2 + 2 + 2 + 2 + 3 + 3
    assert residual_flops(residual, 32, 6) == 6 * 32 * sources + 6 * 2 * 32


def test_sums_that_got_lost_are_refused(build):
    model = build(blocks_of(2))
    with pytest.raises(RuntimeError, match='the sums of earlier blocks did not arrive'):
        model.decoder.layers[1](hidden_states=torch.randn(8, 2, 32), attention_mask=None)


def test_a_layer_without_mlp_is_refused(build):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    def spec(config):
        whole = get_gpt_layer_local_spec()
        parts = dataclasses.replace(
            whole.submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
        )
        return dataclasses.replace(whole, submodules=parts)

    with pytest.raises(ValueError, match='layer 1 has no MLP'):
        build(blocks_of(2), spec=spec)


KIND = '--residual-type attention '


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ('--mhc-post-stream high', 'nothing to overlap'),
        ('--mhc-alarm warn', 'no H_res to monitor'),
        ('--mhc-num-residual-streams 4', 'no effect with --residual-type attention'),
        ('--mhc-recompute-layer-num auto', 'no effect with --residual-type attention'),
        ('--attention-residual-block-size 0', '--attention-residual-block-size 0'),
        ('--attention-residual-bogus', '--attention-residual-bogus'),
        ('--engram-layers 2', 'sums of earlier outputs'),
    ],
)
def test_refused_in_one_line(refused, flags, said):
    assert said in refused(KIND + flags)


def test_flags_belong_to_it(parse, refused):
    assert parse(*KIND.split()).attention_residual_block_size == 24
    assert '--attention-' in refused('--residual-type mhc --attention-residual-block-size 8')
    check_residual(SimpleNamespace(), ResidualConfig('attention'))
    one, other = (ResidualConfig('attention', attention_block_size=size) for size in (4, 5))
    assert not same_structure(one, other) and not same_structure(one, ResidualConfig('standard'))


def test_trains_and_is_told_from_others(tmp_path, refused):
    """The loss falls, and the checkpoint is held to its block size."""
    train(tmp_path, '--residual-type attention --attention-residual-block-size 3')
    line = refused(f'{KIND}--load {tmp_path} --attention-residual-block-size 4')
    assert 'attention_block_size=3' in line and 'attention_block_size=4' in line
