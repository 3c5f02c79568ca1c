"""Back from a folder of transformers': every bit, by real ranks, and what is refused."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil

import hf_models
import pytest
import torch
from hf_models import GROUPED, LLAMA, UNTIED
from launch import start
from safetensors.torch import load_file, save_file

from megatron_mhc.convert.conversion import convert
from megatron_mhc.convert.hf.config import config_from_args
from megatron_mhc.convert.hf.export import export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.convert.source import open_source

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16
    --max-position-embeddings 16 --transformer-impl local {LLAMA} {UNTIED}
    --residual-type mhc --mhc-stream-merge learned
"""
RUN = f"""
    {SHAPE} --micro-batch-size 2 --global-batch-size 2 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 95 --eval-iters 1 --eval-interval 1000 --log-interval 1 --split 98,1,1
    --num-workers 0 --hidden-dropout 0 --attention-dropout 0 --train-iters 1 --lr 1e-2
    --make-vocab-size-divisible-by 32
"""


def contents(path: pathlib.Path) -> dict[str, torch.Tensor]:
    source = open_source(path)
    return {name: source.tensor(name) for name, entry in source.entries.items() if entry.shape}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


def train(world: int, *flags: object) -> str:
    script = ROOT / 'examples' / 'pretrain_gpt.py'
    done = start(world, '-m', 'megatron_mhc.run', script, *RUN.split(), *flags).result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-layer-freq [0]+[1]*1
    --moe-shared-expert-intermediate-size 16 --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --multi-latent-attention --qk-layernorm
    --q-lora-rank 8 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8
    --mhc-numerics deepseek-v4
""".split()
LAYOUT = ('--bf16', '--ckpt-format', 'torch_dist')


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> pathlib.Path:
    """Of two pipeline stages, in bf16."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    flags = ('--pipeline-model-parallel-size', 2, *LAYOUT, *GROUPED.split())
    train(2, *flags, '--save', folder, '--save-interval', 1)
    return folder


@pytest.fixture(scope='module')
def exported(trained) -> pathlib.Path:
    export(trained, trained.parent / 'hf')
    return trained.parent / 'hf'


def assert_loads(trained: pathlib.Path, exported: pathlib.Path, *flags: str) -> None:
    back = exported.parent / 'back'
    restore(exported, back)
    before, after = contents(trained), contents(back)
    assert_same(before, after)
    assert {value.dtype for value in after.values()} == {torch.bfloat16, torch.float32}
    args = [open_source(path).args for path in (trained, back)]
    assert config_from_args(args[0]) == config_from_args(args[1])
    said = train(1, *LAYOUT, *flags, '--load', back)
    assert 'successfully loaded checkpoint' in said


def test_there_and_back_keeps_every_bit_and_ranks_load_it(trained, exported):
    assert_loads(trained, exported, *GROUPED.split())


def test_so_it_does_with_experts_and_latent_attention(tmp_path):
    train(1, *LAYOUT, *EXPERTS, '--save', tmp_path / 'run', '--save-interval', 1)
    export(tmp_path / 'run', tmp_path / 'hf')
    assert_loads(tmp_path / 'run', tmp_path / 'hf', *EXPERTS)
    assert open_source(tmp_path / 'back').args.mhc_numerics == 'deepseek-v4'


def test_a_llama_of_transformers_gets_streams(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / 'llama')
    report = convert(tmp_path / 'llama', tmp_path / 'mhc', 'mhc', verify=True)
    assert report.origin == 'standard'
    assert report.verified['difference'] < 3e-6 < report.verified['largest']
    restore(tmp_path / 'llama', tmp_path / 'standard')
    export(tmp_path / 'standard', tmp_path / 'again')
    first, second = (load_file(tmp_path / p / 'model.safetensors') for p in ('llama', 'again'))
    assert_same(first, second)


def edit(folder: pathlib.Path, **values) -> None:
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change(folder: pathlib.Path, **tensors: torch.Tensor | None) -> None:
    file = folder / 'model.safetensors'
    kept = load_file(file) | {name.replace('__', '.'): t for name, t in tensors.items()}
    save_file({name: t for name, t in kept.items() if t is not None}, file)


def only_pickles(folder: pathlib.Path) -> None:
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({}))


def broken_index(folder: pathlib.Path) -> None:
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text('{"weight_map": {"a": 1, "b": "c"}}')


CODE = {'AutoModelForCausalLM': 'modeling_other.Other'}
BAD = {
    'pickles': (only_pickles, 'pickles are not read'),
    'other code': (lambda f: edit(f, auto_map=CODE), 'auto_map of other code than ours'),
    'another model': (lambda f: edit(f, auto_map=None, model_type='bert'), 'model_type bert'),
    'no configuration': (lambda f: (f / 'config.json').write_text('['), 'cannot be read'),
    'a tensor gone': (lambda f: change(f, model__norm__weight=None), r'norm\.weight is missing'),
    'one too many': (lambda f: change(f, extra=torch.ones(1)), 'extra is no tensor of the model'),
    'integers': (
        lambda f: change(f, model__norm__weight=torch.ones(32, dtype=torch.int32)),
        'stored as I32',
    ),
    'other heads': (lambda f: edit(f, num_key_value_heads=3), 'the shape of .*q_proj'),
    'no heads': (lambda f: edit(f, num_attention_heads=None), 'lacks a value, or has one'),
    'no depth': (lambda f: edit(f, num_hidden_layers='x'), 'lacks a value, or has one'),
    'no dtype': (lambda f: edit(f, dtype='x'), 'lacks a value, or has one'),
    'other words': (lambda f: edit(f, vocab_size=64), r'embedding has shape \[96, 32\], where'),
    'an index of numbers': (broken_index, 'index.json cannot be read'),
    'a gate': (lambda f: edit(f, hidden_act='gelu'), 'hidden_act gelu with a gate'),
}


@pytest.mark.parametrize('case', BAD)
def test_what_is_not_read_is_refused_in_one_line(exported, tmp_path, case):
    damage, message = BAD[case]
    folder = shutil.copytree(exported, tmp_path / 'copy')
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        restore(folder, tmp_path / 'back')
    assert '\n' not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {'copy'}


def test_what_is_of_megatron_already(trained, tmp_path):
    with pytest.raises(ValueError, match='one of Megatron already'):
        restore(trained, tmp_path / 'back')


def test_arguments_come_back(parse):
    """What is read of them, for models of every kind."""
    from megatron_mhc.convert.hf.config import fill_args

    for flags in (
        f'{LLAMA} {UNTIED} {GROUPED} --qk-layernorm --use-rope-scaling',
        '--position-embedding-type learned_absolute --squared-relu --no-bias-gelu-fusion',
        f'--residual-type mhc {LLAMA} --mhc-manifold kronecker --rotary-percent 0.5 --bf16',
        f'--residual-type mhc {LLAMA} --mhc-single-pass --mhc-fixed-mappings post',
        '--residual-type hc --hc-no-tanh --hc-variant dynamic --add-qkv-bias',
        f'{LLAMA} --multi-latent-attention --q-lora-rank 8 --rotary-scaling-factor 40',
        f'{LLAMA} --multi-latent-attention --rope-type rope --qk-layernorm',
        f'{LLAMA} --num-experts 4 --moe-layer-freq [0]+[1]*2 --moe-router-pre-softmax',
    ):
        config = config_from_args(hf_models.arguments(parse, flags))
        args = parse(*hf_models.BASE.split())
        fill_args(args, json.loads(json.dumps(config)))
        assert config_from_args(args) == config
