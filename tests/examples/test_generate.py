"""``examples/generate.py`` through the launcher: from a trained checkpoint to text."""

from __future__ import annotations

import pathlib
import re

import launch as ranks

EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples'
MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --transformer-impl local
    --tokenizer-type NullTokenizer --vocab-size 256
""".split()
TRAINING = """
    --micro-batch-size 1 --global-batch-size 4 --mock-data --split 98,1,1 --num-workers 0
    --train-iters 2 --save-interval 2 --lr 1e-2 --eval-iters 1 --eval-interval 100
    --ckpt-format torch_dist
""".split()


def launch(script: str, *flags: object, processes: int = 1) -> str:
    words = ('-m', 'megatron_mhc.run', EXAMPLES / script, '--residual-type', 'mhc', *flags)
    done = ranks.launch(processes, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_model_trained_on_two_stages_continues_prompts(tmp_path):
    """Twice the same greedily; the prompts come back, each with as many bytes as were asked for."""
    checkpoint = tmp_path / 'checkpoint'
    stages = ('--pipeline-model-parallel-size', 2)
    launch('pretrain_gpt.py', *MODEL, *TRAINING, *stages, '--save', checkpoint, processes=2)
    loaded = ('--load', checkpoint, '--use-checkpoint-args', '--vocab-size', 256)
    prompts = ['def main(', 'import']
    flags = (*loaded, '--greedy', '--tokens', 10, '--prompt', *prompts)
    first, tensor_parallel = (
        launch('generate.py', *flags),
        launch('generate.py', *flags, '--tensor-model-parallel-size', 2, processes=2),
    )
    texts = re.findall(r'^--- (.*)$', first, re.MULTILINE)
    assert [text.startswith(p) for text, p in zip(texts, prompts, strict=True)] == [True, True]
    assert all(len(text) > len(p) for text, p in zip(texts, prompts, strict=True))
    assert first.split('\n--- ')[1:] == tensor_parallel.split('\n--- ')[1:]
