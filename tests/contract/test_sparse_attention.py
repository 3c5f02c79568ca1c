"""Sparse attention (``D``) on the emulated device: Megatron's layer, its rotation in torch."""

from __future__ import annotations

import pytest
import torch
from layout_cases import LATENT, SPARSE
from test_hybrid_model import CONSTANT, MHC, block_spec, randomise

from megatron_mhc import compat
from megatron_mhc.runtime.cpu_hadamard import rotate_activation

TOKENS = 16
MAMBA = {'mamba_state_dim': 8, 'mamba_head_dim': 8, 'mamba_num_groups': 2}
# Every token is among the chosen, and the indexer has nothing to learn.
ALL = {'dsa_indexer_topk': TOKENS, 'dsa_indexer_loss_coeff': 0.0}
QUERIES = {'of hidden states': {}, 'of a latent': {'q_lora_rank': 12}}
HAS = compat.core_minor(compat.core_version()) != '0.17'
needs_symbol = pytest.mark.skipif(not HAS, reason='core 0.17 has no symbol for sparse attention')


def hadamard(width):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix)
    return matrix


@pytest.mark.parametrize(('size', 'width'), [(1, 1), (2, 2), (8, 8), (12, 16), (64, 64)])
def test_the_rotation_is_a_hadamard_matrix(size, width):
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(1)).double()
    wanted = x @ hadamard(width)[:size, :size] / size**0.5
    torch.testing.assert_close(rotate_activation(x), wanted, rtol=1e-12, atol=1e-12)
    if size == width:
        again = rotate_activation(rotate_activation(x))
        torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(rotate_activation, x.requires_grad_())


def test_a_16_bit_rotation_is_summed_in_fp32():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(rotate_activation(x), rotate_activation(x.float()).bfloat16())


@pytest.fixture
def sparse(megatron):
    from hybrid_models import hybrid_model

    def make(residual=None, pattern='D-D-', **settings):
        return hybrid_model(pattern, residual, **{**SPARSE, **settings})

    return make


@needs_symbol
@pytest.mark.parametrize('queries', QUERIES)
@pytest.mark.parametrize('residual', [None, MHC])
def test_with_every_token_chosen_it_is_latent_attention(build, sparse, step, residual, queries):
    """Of a GPT model with the same weights. The indexer, which that lacks, learns nothing."""
    from hybrid_models import name_in_hybrid

    latent = {**LATENT, 'add_bias_linear': False, 'normalization': 'RMSNorm', **QUERIES[queries]}
    gpt = build(residual, block_spec, num_layers=2, **latent)
    randomise(gpt)
    model = sparse(residual, **ALL, **QUERIES[queries])
    given = {name_in_hybrid(name): weight for name, weight in gpt.named_parameters()}
    own = dict(model.named_parameters())
    indexer = {name for name in own if '.indexer.' in name}
    # Queries, keys, the norm of keys, and the weights of heads, in both layers.
    assert len(indexer) == 10 and own.keys() - indexer == given.keys()
    with torch.no_grad():
        for name, weight in given.items():
            own[name].copy_(weight)
    (loss, gradients), (wanted, references) = step(model), step(gpt)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for name, reference in references.items():
        gradient = gradients[name_in_hybrid(name)]
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6, msg=name)
    assert not any(gradients[name].any() for name in indexer if name in gradients)


@needs_symbol
def test_a_layer_computes_its_equation_and_chooses(sparse):
    """Eq 3 of mHC, written out; of the tokens before it, each attends to four."""
    model = sparse(MHC)
    randomise(model)
    layer = model.decoder.layers[2].eval()
    x = torch.randn(TOKENS, 2, 4 * 32, generator=torch.Generator().manual_seed(1))
    h_pre, h_post, h_res = layer.self_attention_hyper_connection.all_maps(x)
    streams = x.unflatten(-1, (4, 32))
    u = layer.input_layernorm(torch.einsum('...n,...nc->...c', h_pre, streams))
    y, _ = layer.self_attention(u, attention_mask=None)
    wanted = h_res @ streams + h_post.unsqueeze(-1) * y.unsqueeze(-2)
    output, *_ = layer(x, attention_mask=None)
    torch.testing.assert_close(output, wanted.flatten(-2), rtol=1e-5, atol=1e-6)
    layer.self_attention.core_attention.index_topk = TOKENS
    layer.self_attention.core_attention.indexer.index_topk = TOKENS
    every, _ = layer.self_attention(u, attention_mask=None)
    # The first four have no more than four tokens to choose from.
    torch.testing.assert_close(every[:4], y[:4], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(every[4:], y[4:], rtol=1e-3)


@needs_symbol
@pytest.mark.parametrize('residual_type', ['hc', 'mhc'])
def test_with_constant_maps_it_is_the_standard_model(sparse, step, residual_type):
    standard = sparse(pattern='DMD-', **MAMBA)
    widened = sparse({'residual_type': residual_type, **CONSTANT}, pattern='DMD-', **MAMBA)
    (loss, gradients), (wanted, references) = step(widened), step(standard)
    assert torch.equal(loss, wanted) and gradients.keys() == references.keys()
    learned = 'decoder.layers.0.self_attention.core_attention.indexer.linear_wk.weight'
    assert references[learned].abs().max() > 0
    for name, reference in references.items():
        torch.testing.assert_close(gradients[name], reference, rtol=1e-5, atol=1e-7, msg=name)


@needs_symbol
def test_recomputed_in_segments_no_bit_changes(sparse, step):
    (loss, gradients), (again, recomputed) = (
        step(sparse({**MHC, **chosen})) for chosen in ({}, {'recompute_layer_num': 2})
    )
    assert torch.equal(loss, again) and gradients.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)


def test_a_linear_layer_that_is_not_whole_is_refused():
    from megatron_mhc.patches.cpu_sparse import ReplicatedLinear

    for other in ({'parallel_mode': 'column'}, {'bias': True}, {'skip_bias_add': True}):
        with pytest.raises(ValueError, match='whole on every rank'):
            ReplicatedLinear(4, 4, config=None, init_method=None, **other)
