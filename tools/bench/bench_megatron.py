"""What the scripts that train in Megatron's real loop share: the model, and how its log reads."""

from __future__ import annotations

import argparse
import re

# Of an iteration: its number, milliseconds and loss.
LINE = re.compile(r'iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: (\S+)')
HEAD = 64


def require_heads(parser: argparse.ArgumentParser, hidden_size: int) -> None:
    """End in one line where attention cannot have heads of 64 channels."""
    if hidden_size % HEAD:
        parser.error(
            f'--hidden-size {hidden_size}: attention has heads of {HEAD}; give a multiple of {HEAD}'
        )


def model_flags(options: argparse.Namespace, engine: bool) -> list[str]:
    """Megatron's arguments of a dense GPT on made-up data, in bf16.

    Args:
        options: ``num_layers``, ``hidden_size``, ``seq_length``, ``train_iters``.
        engine: whether Transformer Engine is installed; without it, layers are Megatron's own.
    """
    chosen = f"""
        --num-layers {options.num_layers} --hidden-size {options.hidden_size}
        --num-attention-heads {options.hidden_size // HEAD} --seq-length {options.seq_length}
        --max-position-embeddings {options.seq_length} --position-embedding-type rope
        --normalization RMSNorm --swiglu --disable-bias-linear --bf16
        --attention-dropout 0 --hidden-dropout 0
        --mock-data --tokenizer-type NullTokenizer --vocab-size 32000
        --micro-batch-size 1 --seed 1 --train-iters {options.train_iters}
        --eval-iters 0 --eval-interval 100000 --log-interval 1
    """
    if not engine:
        chosen += """--transformer-impl local --no-gradient-accumulation-fusion
            --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion"""
    return chosen.split()
