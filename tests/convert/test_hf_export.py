"""The command, what it writes and what it refuses; generation, training, other dtypes."""

from __future__ import annotations

import json

import hf_models
import pytest
import torch
from hf_models import GROUPED, LLAMA, loaded
from safetensors.torch import load_file

from megatron_mhc import cli
from megatron_mhc.convert import output
from megatron_mhc.convert.hf.export import export

MHC = f'--residual-type mhc {LLAMA} {GROUPED}'
GATED = f'--residual-type gated --gated-residual-rank 5 {LLAMA}'
ATTENTION = f'--residual-type attention --attention-residual-block-size 3 {LLAMA}'


@pytest.fixture
def run(megatron, parse, random_seed, tmp_path):
    """``run(flags)`` -> a checkpoint."""

    def make(flags: str = MHC, **values):
        args = hf_models.arguments(parse, flags)
        path = hf_models.checkpoint(args, tmp_path / 'run')
        if values:
            edit(path, **values)
        return path

    return make


def edit(path, tensors=None, **values):
    file = path / 'mp_rank_00' / 'model_optim_rng.pt'
    state = torch.load(file, weights_only=False)
    state['model'] |= tensors or {}
    for name, value in values.items():
        setattr(state['args'], name, value)
    torch.save(state, file)


@pytest.mark.parametrize('flags', [MHC, f'{MHC} --mhc-single-pass', GATED, ATTENTION])
def test_generation_with_a_cache_is_generation_without(run, tmp_path, flags):
    export(run(flags), tmp_path / 'hf')
    model = loaded(tmp_path / 'hf')
    tokens = torch.randint(96, (2, 5))
    # The first of a batch may be padded on the left.
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {'max_new_tokens': 12, 'do_sample': False, 'pad_token_id': 0}
    both = [
        model.generate(tokens, attention_mask=mask, use_cache=cache, **settings)
        for cache in (True, False)
    ]
    assert torch.equal(*both) and both[0].shape == (2, 17)
    alone = model.generate(tokens[:1, 2:], attention_mask=mask[:1, 2:], **settings)
    assert torch.equal(alone[0], both[0][0, 2:])
    assert model.generate(tokens, num_beams=2, **settings).shape == (2, 17)


@pytest.mark.parametrize('flags', [MHC, GATED, ATTENTION])
def test_gradients_are_the_same_with_checkpointing(run, tmp_path, flags):
    export(run(flags), tmp_path / 'hf')
    tokens = torch.randint(96, (2, 7))

    def gradients(checkpointing):
        model = loaded(tmp_path / 'hf').train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(tokens, labels=tokens, output_hidden_states=True)
        outputs.loss.backward()
        assert len(outputs.hidden_states) == 4
        # Of n streams, or of two block sums.
        assert outputs.hidden_states[1].shape == (2, 7, (2 if flags == ATTENTION else 4) * 32)
        return {name: p.grad for name, p in model.named_parameters()}

    stored, rebuilt = gradients(False), gradients(True)
    assert stored and stored.keys() == rebuilt.keys()
    for name, value in stored.items():
        # The first query has one source to choose from.
        alone = flags == ATTENTION and 'layers.0.self_attention_h' in name
        assert value is not None and bool(value.abs().max() > 0) != alone, name
        torch.testing.assert_close(rebuilt[name], value, msg=name)


EXPERTS = '--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16'


def test_every_part_can_be_offloaded_or_cast_afterwards(run, tmp_path):
    export(run(f'{MHC} {EXPERTS} --mhc-stream-merge learned'), tmp_path / 'hf')
    exact, tokens = loaded(tmp_path / 'hf'), torch.randint(96, (2, 7))
    names = ['embed_tokens', 'norm', 'stream_merge', *(f'layers.{i}' for i in range(3))]
    disk = {f'model.{name}': 'disk' for name in names} | {'lm_head': 'cpu'}
    disk['model.embed_tokens'] = 'cpu'
    with torch.no_grad():
        expected = exact(tokens).logits
        for place in ('auto', disk):
            model = loaded(tmp_path / 'hf', device_map=place, offload_folder=tmp_path / 'off')
            assert torch.equal(model(tokens).logits, expected), place
        difference = exact.to(torch.bfloat16)(tokens).logits - expected
        # Not the largest: a token that rounding sends to another expert differs as a whole.
        assert difference.abs().median() < 0.05


def test_the_loss_and_the_logits_that_trainer_and_generate_ask_for(run, tmp_path):
    export(run(), tmp_path / 'hf')
    model, tokens = loaded(tmp_path / 'hf'), torch.randint(96, (2, 7))
    with torch.no_grad():
        whole = model(tokens, labels=tokens)
        part = model(tokens, labels=tokens, num_items_in_batch=48)
        # The first of each seven has no token before it.
        torch.testing.assert_close(part.loss, whole.loss * 12 / 48)
        for keep, own in ((1, [-1]), (2, [-2, -1]), (torch.tensor([0, 4]), [0, 4])):
            got = model(tokens, logits_to_keep=keep).logits
            torch.testing.assert_close(got, whole.logits[:, own])
        model.config.output_hidden_states = True
        assert len(model(tokens).hidden_states) == 4
    fresh = type(model.config)()
    fresh.rope_parameters['rope_theta'] = 1.0
    assert type(model.config)().rope_parameters['rope_theta'] == 10000.0


def test_bf16_keeps_the_maps_in_fp32(run, tmp_path):
    export(run(), tmp_path / 'hf')
    exact, model = loaded(tmp_path / 'hf'), loaded(tmp_path / 'hf', dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        fp32 = 'hyper_connection' in name
        assert value.dtype == (torch.float32 if fp32 else torch.bfloat16), name
    tokens = torch.randint(96, (2, 7))
    with torch.no_grad():
        assert (model(tokens).logits - exact(tokens).logits).abs().max() < 0.1


def test_what_the_command_says_and_writes(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output, 'SHARD_BYTES', 40_000)
    source = run()

    def command(*flags):
        with pytest.raises(SystemExit) as ended:
            cli.main(['convert', str(source), str(tmp_path / 'hf'), '--to', 'hf', *flags])
        return ended.value.code, capsys.readouterr()

    status, said = command('--dry-run')
    assert status == 0 and 'nothing was written' in said.out
    assert {path.name for path in tmp_path.iterdir()} == {'run'}
    status, said = command('--json', '--verify')
    report = json.loads(said.out)
    assert status == 0 and report['config']['residual_type'] == 'mhc'
    assert report['verified']['difference'] < 1e-5 < 0.1 < report['verified']['largest']
    assert 'NullTokenizer' in report['tokenizer'] or 'no tokenizer' in report['tokenizer']
    folder = tmp_path / 'hf'
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    files = {path.name for path in folder.glob('*.safetensors')}
    assert len(files) > 2 and files == set(index['weight_map'].values())
    tensors = {name: value for file in files for name, value in load_file(folder / file).items()}
    assert len(tensors) == report['tensors'] == len(index['weight_map'])
    assert not list(folder.glob('*.pt'))
    status, said = command('--overwrite', '--mhc-stream-merge', 'mean', '--unchecked')
    assert status == 2 and '--mhc-stream-merge, --unchecked: no effect with --to hf' in said.err
    status, said = command()
    assert status == 2 and said.err.count('\n') == 1 and 'add --overwrite' in said.err


def test_prediction_layers_are_left_out_and_told_of(run, tmp_path):
    path = run()
    edit(path, {'mtp.layers.0.eh_proj.weight': torch.ones(32, 64)}, mtp_num_layers=1)
    report = export(path, tmp_path / 'hf')
    assert report.dropped == 1 and loaded(tmp_path / 'hf') is not None


def test_the_tokenizer_of_the_run_goes_along(run, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({'a': 0, 'b': 1, '</s>': 2}, unk_token='a'))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token='</s>').save_pretrained(
        tmp_path / 'words'
    )
    path, own = run(), str(tmp_path / 'words')
    edit(path, tokenizer_type='HuggingFaceTokenizer', tokenizer_model=own)
    assert export(path, tmp_path / 'hf').tokenizer == f'tokenizer: {own}'
    assert AutoTokenizer.from_pretrained(tmp_path / 'hf')('b</s>')['input_ids'] == [1, 2]
    assert loaded(tmp_path / 'hf').generation_config.eos_token_id == 2
    edit(path, tokenizer_model=str(tmp_path / 'gone'))
    assert 'cannot be read on this machine' in export(path, tmp_path / 'again').tokenizer


@pytest.mark.parametrize('damage', ['tokenizer.json', 'tokenizer_config.json'])
def test_a_tokenizer_that_is_damaged_or_has_code_is_told_of(run, tmp_path, damage, capsys):
    own = tmp_path / 'own'
    own.mkdir()
    (own / 'tokenizer.json').write_text('{"model": 1}')
    if damage == 'tokenizer_config.json':
        (own / damage).write_text('{"auto_map": {"AutoTokenizer": ["code.Own", null]}}')
        (own / 'config.json').write_text('{"model_type": "own"}')
        (own / 'code.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    else:
        (own / 'tokenizer_config.json').write_text('{"tokenizer_class": "TokenizersBackend"}')
    path = run(tokenizer_type='HuggingFaceTokenizer', tokenizer_model=str(own))
    said = export(path, tmp_path / 'hf').tokenizer
    assert 'cannot be read on this machine' in said and '\n' not in said
    assert 'y/N' not in capsys.readouterr().out and not (tmp_path / 'ran').exists()


REFUSED = {
    'mudd_variant': ({'residual_type': 'mudd'}, '--residual-type mudd'),
    'window': ({'window_size': (8, 0)}, r'--window-size \(8, 0\)'),
    'gate': ({'attention_output_gate': True}, '--attention-output-gate, for which'),
    'memory': ({'engram_layers': [2]}, r'--engram-layers \[2\]'),
    'sink': ({'softmax_type': 'learnable'}, '--softmax-type learnable'),
    'manifold': ({'mhc_manifold': 'mine'}, '--mhc-manifold mine'),
    'squares': ({'mhc_manifold': 'orthostochastic'}, '--mhc-manifold orthostochastic, for which'),
    'hybrid': ({'hybrid_layer_pattern': 'M*-'}, r'--hybrid-layer-pattern M\*-.*keep.*stays hybrid'),
    'hybrid twin': (
        {'hybrid_layer_pattern': '*-|*E/*E'},
        r'--hybrid-layer-pattern \*-\|\*E/\*E, .*; first convert it --to gpt, and what comes of',
    ),
    'hybrid memory': (
        {'hybrid_override_pattern': '*-*-', 'engram_layers': [1]},
        r'--hybrid-override-pattern .*; nor has --engram-layers; keep',
    ),
    'capacity': ({'moe_expert_rank_capacity_factor': 1.0}, '--moe-expert-rank-capacity-factor 1'),
    'random experts': ({'moe_router_force_load_balancing': True}, '--moe-router-force-load-bal'),
    'biased experts': ({'moe_router_force_biased': 0.1}, '--moe-router-force-biased 0.1'),
    'latent part': (
        {'multi_latent_attention': True, 'rotary_percent': 0.5},
        '--multi-latent-attention with --rotary-percent 0.5',
    ),
    'streams of Megatron': (
        {'enable_hyper_connections': True},
        '--enable-hyper-connections.*first convert it --to mhc',
    ),
    'positions': ({'position_embedding_type': 'relative'}, '--position-embedding-type relative'),
    'depth': ({'num_layers': 4}, r'decoder\.layers\.3\..* is missing'),
    'shallow': ({'num_layers': 2}, r'decoder\.layers\.2\..* no tensor of the model .* others'),
    'vocabulary': ({'padded_vocab_size': 64}, r'word_embeddings\.weight has shape \[96, 32\]'),
    'qkv': ({'num_query_groups': 3}, r'linear_qkv\.weight has shape'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_has_no_form_is_refused_before_anything_is_written(run, tmp_path, case):
    values, message = REFUSED[case]
    source = run(**values)
    with pytest.raises(ValueError, match=message) as refused:
        export(source, tmp_path / 'hf')
    assert '\n' not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {'run'}
