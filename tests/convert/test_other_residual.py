"""A standard model with gates is what it was; with attention over block sums it is close."""

from __future__ import annotations

import hf_models
import pytest
import torch
from hf_models import GROUPED, LLAMA, UNTIED

from megatron_mhc import cli
from megatron_mhc.convert.hf.export import export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.convert.other_residual import change
from megatron_mhc.convert.source import open_source

EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-layer-freq [0]+[1]*2
    --multi-latent-attention --qk-layernorm --q-lora-rank 16 --kv-lora-rank 16
    --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8
"""
MODELS = {'dense': f'{LLAMA} {GROUPED}', 'latent, experts': f'{LLAMA} {UNTIED} {EXPERTS}'}


@pytest.fixture
def made(megatron, parse, random_seed, tmp_path):
    def run(flags: str):
        return hf_models.checkpoint(hf_models.arguments(parse, flags), tmp_path / 'run')

    return run


def logits(path):
    found = hf_models.megatron_logits(path)
    return found, found.abs().max()


@pytest.mark.parametrize('kind', MODELS)
def test_gates_start_as_the_model_that_it_was(made, tmp_path, kind):
    """Of a file, whose layers are apart, and of a distributed checkpoint, where they are one."""
    source = made(MODELS[kind])
    expected, largest = logits(source)
    settings = {'gated_rank': 5, 'num_residual_streams': 3}
    report = change(source, tmp_path / 'gated', 'gated', settings=settings, unchecked=True)
    assert report.exact and len(report.left_out) == 2 * 3 + 1
    export(source, tmp_path / 'hf')
    restore(tmp_path / 'hf', tmp_path / 'dist')
    change(tmp_path / 'dist', tmp_path / 'other', 'gated', settings=settings, unchecked=True)
    for path in (tmp_path / 'gated', tmp_path / 'other'):
        args = open_source(path).args
        assert (args.residual_type, args.gated_residual_rank) == ('gated', 5)
        assert args.gated_residual_init == 'prenorm'
        assert (logits(path)[0] - expected).abs().max() < 1e-5 * largest
    weights = open_source(tmp_path / 'other').entries
    assert not any('final_layernorm' in name or 'input_layernorm' in name for name in weights)


@pytest.mark.parametrize('size', [2, 3, 24])
def test_attention_starts_as_it_was_but_for_the_eps_of_norms(made, tmp_path, size):
    source = made(f'{LLAMA} {GROUPED} --norm-epsilon 1e-12')
    expected, largest = logits(source)
    settings = {'attention_block_size': size}
    report = change(source, tmp_path / 'new', 'attention', settings=settings, unchecked=True)
    assert not report.exact and not report.left_out
    assert (logits(tmp_path / 'new')[0] - expected).abs().max() < 1e-5 * largest
    file = source / 'mp_rank_00' / 'model_optim_rng.pt'
    state = torch.load(file, weights_only=False)
    state['args'].layernorm_epsilon = state['args'].norm_epsilon = 1e-2
    torch.save(state, file)
    change(source, tmp_path / 'other', 'attention', settings=settings, unchecked=True)
    apart = (logits(tmp_path / 'other')[0] - logits(source)[0]).abs().max()
    assert apart > 1e-3 * largest


@pytest.mark.parametrize(
    ('flags', 'words', 'message'),
    [
        ('--residual-type mhc', '--to gated', 'is a mhc checkpoint, and only a standard'),
        ('--residual-type gated', '--to attention', 'of type gated'),
        ('', '--to gated --gated-residual-rank 0', '--gated-residual-rank 0'),
        ('', '--to gated --break-symmetry 1', '--break-symmetry: no effect with --to gated'),
        ('', '--to attention --gated-residual-rank 2', '--gated-residual-rank: no effect with'),
        ('', '--to mhc --gated-residual-rank 2', '--gated-residual-rank: no effect with --to mhc'),
        ('--normalization LayerNorm', '--to gated', '--normalization LayerNorm, and its reads'),
        ('--mtp-num-layers 1', '--to attention', '--mtp-num-layers 1, whose layers predict'),
    ],
)
def test_what_cannot_be_is_one_line(made, parse, tmp_path, capsys, flags, words, message):
    source = made(f'{LLAMA} {flags}')
    with pytest.raises(SystemExit) as ended:
        cli.main(['convert', str(source), str(tmp_path / 'new'), *words.split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count('\n') == 1, said
    assert not (tmp_path / 'new').exists()


def test_the_command_says_what_it_does(made, tmp_path, capsys):
    source, new = made(LLAMA), tmp_path / 'new'
    for words, said in (
        (
            '--to gated --gated-residual-rank 4',
            'left out, its weight is in a gain: decoder.f',
        ),
        ('--to attention --overwrite', 'not exact: a norm behind the mean of k sums'),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(['convert', str(source), str(new), *words.split(), '--unchecked'])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and said in out and f'--load {new} --residual-type' in out
