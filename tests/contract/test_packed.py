"""Packed sequences (THD): documents in one row compute what each computes alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

STREAMS = 2
LENGTHS = (5, 1, 3)
VOCABULARY = 64
MHC = {'residual_type': 'mhc', 'kernel_backend': 'torch'}
FULL = {'recompute_granularity': 'full', 'recompute_method': 'uniform', 'recompute_num_layers': 1}
ENGRAM = {'layers': (1, 3), 'ngram_orders': (2, 3), 'heads': 2, 'table_size': 50, 'dim': 16}
MODELS = {
    'standard': (None, {}),
    'hc': ({'residual_type': 'hc'}, {}),
    'mhc': (MHC | {'init': 'identity'}, {}),
    'kernels': ({'kernel_backend': 'triton'}, {}),
    'single-pass': (MHC | {'single_pass': True}, {}),
    'learned-merge': (MHC | {'stream_merge': 'learned'}, {}),
    'segments': (MHC | {'recompute_layer_num': 1}, {}),
    'full': (MHC, FULL),
    'single-pass-full': (MHC | {'single_pass': True}, FULL),
    'engram': (MHC, {'engram': ENGRAM}),
    'gated': ({'residual_type': 'gated', 'gated_rank': 3}, {'normalization': 'RMSNorm'}),
    'attention': ({'residual_type': 'attention', 'num_residual_streams': 4}, {}),
    'mudd': ({'residual_type': 'mudd', 'num_residual_streams': 4}, {}),
}


class PackedAttention(torch.nn.Module):
    """In the place of Transformer Engine's: the local one refuses packed sequences."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, attention_mask, packed_seq_params, **others):
        assert packed_seq_params.qkv_format == 'thd'
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        documents = (slice(*ends) for ends in zip(bounds, bounds[1:], strict=False))
        attend = torch.nn.functional.scaled_dot_product_attention
        heads_first = (
            [x[tokens].transpose(0, 1) for x in (query, key, value)] for tokens in documents
        )
        return torch.cat([attend(*qkv, is_causal=True).transpose(0, 1) for qkv in heads_first])


def packed_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec()
    attention = spec.submodules.self_attention
    inside = dataclasses.replace(attention.submodules, core_attention=PackedAttention)
    spec.submodules.self_attention = dataclasses.replace(attention, submodules=inside)
    return spec


def run(model, documents):
    """Losses of each token ``[1, t]`` of documents (tokens, labels) in one row, and gradients."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor([0, *(len(tokens) for tokens, _ in documents)]).cumsum(0).int()
    longest = int(bounds.diff().max())
    packed = PackedSeqParams('thd', bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    tokens, labels = (torch.cat(parts)[None] for parts in zip(*documents, strict=True))
    positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in documents])[None]
    loss = model(tokens, positions, None, labels=labels, packed_seq_params=packed)
    loss.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize(('residual', 'settings'), MODELS.values(), ids=MODELS)
def test_documents_in_one_row_do_not_meet(build, residual, settings, random_seed):
    model = build(residual, spec=packed_spec, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(ours in name for ours in ('hyper_connection', 'merge', 'aggregate', 'engram')):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    documents = [tuple(torch.randint(0, VOCABULARY, (2, length))) for length in LENGTHS]
    loss, gradients = run(model, documents)
    alone = [run(model, [document]) for document in documents]
    torch.testing.assert_close(loss, torch.cat([x for x, _ in alone], 1), rtol=1e-5, atol=2e-6)
    for name, gradient in gradients.items():
        expected = sum(each[name] for _, each in alone)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-5, msg=name)
    # They are packed: other bounds give other losses.
    joined = [tuple(torch.cat(parts) for parts in zip(*documents, strict=True))]
    assert not torch.allclose(run(model, joined)[0], loss, atol=1e-3)
