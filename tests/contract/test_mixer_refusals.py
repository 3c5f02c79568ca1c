"""Layers of a pattern that cannot be: one line, before any model is built."""

from __future__ import annotations

import argparse

import pytest

from megatron_mhc.patches import hybrid_mixers
from megatron_mhc.patches.cpu_arguments import check_limits

# The model is 32 wide: 64 channels in a Mamba layer.
TP2 = '--tensor-model-parallel-size 2'
REFUSED = {
    'M --mamba-head-dim 48': 'twice --hidden-size, 64 does not divide by --mamba-head-dim 48',
    'M --mamba-head-dim 8 --mamba-num-groups 3': 'Mamba heads, 8 does not divide by --mamba-num-',
    'M --mamba-num-heads 6 --mamba-num-groups 4': 'heads, 6 does not divide by --mamba-num-groups',
    f'M --mamba-head-dim 8 --mamba-num-groups 1 {TP2}': f'1 does not divide by {TP2}',
    'G --swiglu --linear-num-value-heads 6 --linear-num-key-heads 4': '--linear-num-value-heads 6 '
    'does not divide by --linear-num-key-heads 4',
    f'G --swiglu --linear-num-key-heads 1 {TP2}': '--linear-num-key-heads 1',
    'M --mamba-head-dim 0 --residual-type mhc': '--mamba-head-dim 0: ',
    'G --swiglu --linear-num-key-heads 0 --residual-type mhc': '--linear-num-key-heads 0: ',
    'E': "'E' (experts) needs --num-experts",
    '+': "'+' (latent attention) needs --multi-latent-attention",
    'D': "'D' (sparse attention) needs --multi-latent-attention",
    'D --multi-latent-attention': "'D' (sparse attention) needs --dsa-indexer-n-heads",
    'D --multi-latent-attention --dsa-indexer-n-heads 2 --dsa-indexer-head-dim 8': 'needs '
    '--dsa-indexer-topk',
    f'G --swiglu --residual-type mhc {TP2}': "Megatron sums the gradient of the output norm of 'G'",
}
SPARSE = (
    '--multi-latent-attention --dsa-indexer-n-heads 2 --dsa-indexer-head-dim 8 '
    '--dsa-indexer-topk 4 --disable-bias-linear'
)
GOOD = 'MG --swiglu --mamba-head-dim 8'


@pytest.mark.parametrize('words', REFUSED)
def test_sizes_that_do_not_divide(refused, words):
    said = refused(f'--hybrid-layer-pattern {words}')
    assert REFUSED[words] in said
    assert ' 0: ' in said or f'--hybrid-layer-pattern {words[0]}: ' in said


def test_a_gated_delta_net_needs_silu(refused, parse):
    assert parse('--hybrid-layer-pattern', *GOOD.split()).hybrid_layer_pattern == 'MG'
    if hybrid_mixers.core_version().startswith('0.17'):
        pytest.skip('core 0.17 has torch for other activations')
    assert 'its kernel has silu alone; add --swiglu' in refused('--hybrid-layer-pattern G')


def test_sparse_attention_has_no_biases(refused, parse):
    flags = f'--hybrid-layer-pattern D {SPARSE}'
    assert parse(*flags.split()).hybrid_layer_pattern == 'D'
    if hybrid_mixers.core_version().startswith(('0.17', '0.18')):
        pytest.skip('before core 0.19 it may have them')
    biased = flags.replace(' --disable-bias-linear', '')
    assert "'D' (sparse attention) has no biases; add --disable-bias-linear" in refused(biased)


def test_latent_attention_is_not_split_on_the_cpu():
    sized = argparse.Namespace(hybrid_layer_pattern='D-', tensor_model_parallel_size=1)
    check_limits(sized, [])
    sized.tensor_model_parallel_size = 2
    for symbol in '+D':
        sized.hybrid_layer_pattern = f'{symbol}-'
        with pytest.raises(ValueError, match='size 2: not on the CPU .* to each rank; use 1'):
            check_limits(sized, [])


def test_packages_that_are_not_there(refused, parse, monkeypatch):
    """As on a GPU without them; on the emulated device they are not needed."""
    monkeypatch.setattr(hybrid_mixers.cpu_device, 'is_installed', lambda: False)
    monkeypatch.setattr('megatron.core.ssm.mamba_mixer.HAVE_MAMBA_SSM', False)
    monkeypatch.setattr('megatron.core.ssm.gated_delta_net.HAVE_FLA', False)
    for flags in ('', ' --residual-type mhc'):
        said = refused(f'--hybrid-layer-pattern {GOOD}{flags}')
        assert "'M' (Mamba) needs the package mamba_ssm, which cannot be imported here" in said
    said = refused('--hybrid-layer-pattern G --swiglu')
    assert "'G' (gated delta net) needs the package fla" in said
    assert "'D' (sparse attention) needs the package fast_hadamard_transform" in refused(
        f'--hybrid-layer-pattern D {SPARSE}'
    )
    # A stack spec of one's own may have other layers for them.
    parse('--hybrid-layer-pattern', *GOOD.split(), '--spec', 'mine', 'stack')
    monkeypatch.undo()
    monkeypatch.setattr(hybrid_mixers.importlib.util, 'find_spec', lambda name: None)
    assert 'needs the package einops; pip' in refused(f'--hybrid-layer-pattern {GOOD}')
