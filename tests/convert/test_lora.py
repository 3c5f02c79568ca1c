"""Adapters of PEFT beside the layers of a frozen model with n streams, in Megatron."""

from __future__ import annotations

import pathlib
import re
import sys

import hf_models
import pytest
import torch
from hf_models import LLAMA, VOCABULARY
from launch import start

from megatron_mhc.convert.build import build
from megatron_mhc.convert.hf.export import export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.convert.saved_args import own_residual
from megatron_mhc.convert.source import open_source

ROOT = pathlib.Path(__file__).parents[2]
RESIDUALS = {
    'mhc': '--residual-type mhc',
    'single pass': '--residual-type mhc --mhc-single-pass',
    'attention': '--residual-type attention --attention-residual-block-size 3',
    'gated': '--residual-type gated --gated-residual-rank 4',
}


@pytest.fixture(scope='module')
def lora():
    sys.path.insert(0, str(ROOT / 'examples'))
    import lora as module

    return module


def loss_of(model, tokens):
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    mask = torch.ones(1, 1, positions.shape[1], positions.shape[1]).triu(1).bool()
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous()).mean()


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize('kind', RESIDUALS)
def test_only_adapters_learn_and_they_come_back(megatron, lora, parse, tmp_path, random_seed, kind):
    args = hf_models.arguments(parse, f'{LLAMA} {RESIDUALS[kind]} --hidden-dropout 0')
    model = build(args, own_residual(args))
    names = {t.key for t in model.sharded_state_dict().values() if hasattr(t, 'data')}
    plain, tokens = weights(model), torch.randint(VOCABULARY, (2, 17))
    before = loss_of(model, tokens)
    settings = lora.add_lora(model, 3)
    # They start at 0.
    assert torch.equal(loss_of(model, tokens), before)
    start_of = weights(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 * 4 * 2
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    for name, value in weights(model).items():
        assert torch.equal(value, start_of[name]) == ('lora_' not in name), name
        if 'lora_' not in name:
            assert torch.equal(value, plain[name.replace('.base_layer', '')]), name
    # In a checkpoint the base has the names of a model without adapters.
    keys = {t.key for t in model.sharded_state_dict().values() if hasattr(t, 'data')}
    assert names < keys and all('lora_' in key for key in keys - names)
    lora.save_adapters(model, settings, tmp_path / 'adapters')
    other = build(args, own_residual(args))
    other.load_state_dict(plain, strict=False)
    lora.add_lora(other, 3)
    lora.load_adapters(other, tmp_path / 'adapters')
    after = loss_of(model, tokens)
    assert torch.equal(loss_of(other, tokens), after) and not torch.equal(after, before)
    lora.merge_adapters(other)
    assert weights(other).keys() == plain.keys()
    torch.testing.assert_close(loss_of(other, tokens), after, rtol=1e-5, atol=1e-6)


def test_what_takes_no_adapters_is_named(megatron, lora, parse):
    args = hf_models.arguments(parse, f'{LLAMA} --residual-type mhc')
    model = build(args, own_residual(args))
    with pytest.raises(ValueError, match='final_layernorm is a .*: only local layers take'):
        lora.add_lora(model, 3, targets=['final_layernorm'])
    model.config.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match='--tensor-model-parallel-size 2: adapters here are whole'):
        lora.add_lora(model, 3)


def test_the_loop_trains_saves_and_resumes(megatron, parse, tmp_path):
    """From the weights of a base, which it keeps, and then from its own checkpoint."""
    model = f'{LLAMA} --residual-type mhc'
    hf_models.checkpoint(hf_models.arguments(parse, model), tmp_path / 'file')
    export(tmp_path / 'file', tmp_path / 'hf')
    restore(tmp_path / 'hf', tmp_path / 'base')
    flags = f"""
        {hf_models.BASE} {model} --micro-batch-size 2 --global-batch-size 2 --mock-data --lr 1e-2
        --seq-length 16 --tokenizer-type NullTokenizer --vocab-size 95 --num-workers 0
        --make-vocab-size-divisible-by 32 --eval-iters 0 --eval-interval 1000 --log-interval 1
        --split 98,1,1 --hidden-dropout 0 --ckpt-format torch_dist --lr-decay-style constant
        --lora-base {tmp_path}/base --lora-rank 3 --train-iters 4 --save-interval 2
    """.split()

    def run(*words):
        path = ROOT / 'examples' / 'lora.py'
        done = start(1, '-m', 'megatron_mhc.run', path, *flags, *words).result()
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return [float(loss) for loss in re.findall(r'lm loss: (\S+)', done.stdout)]

    first = run('--save', tmp_path / 'run', '--exit-interval', 2)
    more = '--save', tmp_path / 'more', '--lora-out', tmp_path / 'adapters'
    assert len(first) == len(run('--load', tmp_path / 'run', *more)) == 2
    sources = [open_source(tmp_path / name) for name in ('base', 'run', 'more')]
    base, early, late = ({n: s.tensor(n) for n, e in s.entries.items() if e.shape} for s in sources)
    assert base.keys() < early.keys() == late.keys()
    for name, value in late.items():
        # What has learned; and what has not.
        moved = not torch.equal(value, early[name])
        assert moved if 'lora_' in name else torch.equal(value, base[name]), name
    assert (tmp_path / 'adapters' / 'adapter_model.safetensors').is_file()
