"""A model that left Megatron, in lm-evaluation-harness: its loss is the one that Megatron logs."""

from __future__ import annotations

import json
import math
import pathlib
import random
import re
import string
import sys

import numpy
import pytest
from launch import launch

from megatron_mhc.convert.hf.export import export

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / 'examples'))

import held_out_task  # noqa: E402

SEQUENCE, WINDOWS = 32, 8
MODEL = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQUENCE}
    --max-position-embeddings {SEQUENCE} --position-embedding-type rope --normalization RMSNorm
    --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --transformer-impl local
    --tokenizer-type NullTokenizer --vocab-size 256 --residual-type mhc
    --micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-2 --num-workers 0
    --eval-iters {WINDOWS // 4} --eval-interval 100 --ckpt-format torch_dist --save-interval 3
""".split()


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> pathlib.Path:
    """One held-out file of whole windows, behind the byte that ends the one before."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp('corpus')
    letters = random.Random(3).choices(string.ascii_letters + ' \n', k=WINDOWS * SEQUENCE - 2)
    text = (''.join(letters) + 'é').encode()
    end = bytes([held_out_task.EOD])
    tokens = numpy.frombuffer(end + text + end, dtype=numpy.uint8)
    builder = IndexedDatasetBuilder(str(folder / 'valid.bin'), dtype=numpy.uint8)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / 'valid.idx'))
    return folder


def validated(corpus: pathlib.Path, checkpoints: pathlib.Path) -> float:
    """The validation loss that Megatron logs after three steps, over all windows."""
    data = [f'--{part}-data-path={corpus / "valid"}' for part in ('train', 'valid')]
    script = ROOT / 'examples' / 'pretrain_gpt.py'
    flags = (*MODEL, *data, f'--data-cache-path={corpus / "cache"}', '--save', checkpoints)
    done = launch(1, '-m', 'megatron_mhc.run', script, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = r'on validation set \| lm loss value: (\S+)'
    return float(re.search(line, done.stdout).group(1))


def test_its_loss_is_the_one_that_megatron_logs(corpus, tmp_path):
    pytest.importorskip('lm_eval', reason="pip install 'megatron-mhc[evaluate]', as CI does")
    loss, model = validated(corpus, tmp_path / 'run'), tmp_path / 'model'
    export(tmp_path / 'run', model)
    assert held_out_task.write(corpus, 'valid', model, tmp_path / 'task') == 1
    loaded = f'pretrained={model},trust_remote_code=True,dtype=float32,max_length={SEQUENCE}'
    done = launch(
        0,
        *('-m', 'lm_eval', 'run', '--model', 'hf', '--model_args', loaded, '--device', 'cpu'),
        *('--tasks', 'held_out', '--include_path', tmp_path / 'task', '--batch_size', 3),
        *('--output_path', tmp_path / 'out'),
        HF_HOME=tmp_path / 'home',
        HF_HUB_OFFLINE=1,
        TOKENIZERS_PARALLELISM='false',
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (results,) = (tmp_path / 'out').rglob('results_*.json')
    bits = json.loads(results.read_text())['results']['held_out']['bits_per_byte,none']
    assert bits * math.log(2) == pytest.approx(loss, rel=2e-6)


def test_tokens_are_the_bytes_of_any_text(tmp_path):
    from transformers import AutoTokenizer

    held_out_task.write_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = ' a\n\tÿ é  \x00 漢字 <|end' + ''.join(map(chr, range(1, 1000)))
    assert tokenizer(text)['input_ids'] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text
    assert tokenizer.eos_token_id == held_out_task.EOD


def test_what_cannot_be_evaluated_is_one_line(corpus, tmp_path, capsys):
    small, tokens = tmp_path / 'small', tmp_path / 'tokens'
    for folder, rows in ((small, 96), (tokens, 256)):
        folder.mkdir()
        (folder / 'config.json').write_text(json.dumps({'vocab_size': rows}))
    (tokens / 'valid.bin').write_bytes(bytes([200, 201, 255]))
    for options, said in (
        ((tmp_path, small), 'there is no valid.bin'),
        ((tokens, tokens), 'tokens that are no bytes of text'),
        ((corpus, small), '96 tokens and no tokenizer, but bytes need 256'),
        ((corpus, tmp_path), 'config.json cannot be read (FileNotFoundError'),
    ):
        with pytest.raises(SystemExit) as ended:
            words = zip(('--corpus', '--model'), map(str, options), strict=True)
            held_out_task.main([*sum(words, ()), '--output', str(tmp_path / 'task')])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count('\n') == 1 and said in error
    assert not (tmp_path / 'task').exists()
