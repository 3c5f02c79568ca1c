"""Megatron's own sizes, checked where a run asks for something of ours.

Megatron checks them after us, by assertions, and we count with them before: a 0 would divide, a
layout of a billion layers would never be laid out. A ``standard`` run is left to Megatron.
"""

from __future__ import annotations

import argparse

from megatron_mhc.inputs.values import (
    MOST_LAYERS,
    MOST_RANKS,
    MOST_SEED,
    MOST_TOKENS,
    MOST_WIDTH,
    check_integer,
    flag_of,
    shown,
)

# The decay of the learning rate that is ours: --lr-decay-style step.
STYLE = 'step'
# Argument -> least and most.
SIZES = {
    'num_layers': (1, MOST_LAYERS),
    'mtp_num_layers': (0, MOST_LAYERS),
    'num_layers_per_virtual_pipeline_stage': (1, MOST_LAYERS),
    'num_virtual_stages_per_pipeline_rank': (1, MOST_LAYERS),
    'hidden_size': (1, MOST_WIDTH),
    'ffn_hidden_size': (1, 16 * MOST_WIDTH),
    'num_attention_heads': (1, MOST_WIDTH),
    'num_experts': (0, MOST_WIDTH),
    'mamba_head_dim': (1, MOST_WIDTH),
    'mamba_num_groups': (1, MOST_WIDTH),
    'linear_num_key_heads': (1, MOST_WIDTH),
    'seq_length': (1, MOST_TOKENS),
    'max_position_embeddings': (1, MOST_TOKENS),
    'micro_batch_size': (1, MOST_TOKENS),
    'global_batch_size': (1, MOST_TOKENS),
    'tensor_model_parallel_size': (1, MOST_RANKS),
    'pipeline_model_parallel_size': (1, MOST_RANKS),
    'context_parallel_size': (1, MOST_RANKS),
    'expert_model_parallel_size': (1, MOST_RANKS),
    'log_interval': (1, MOST_TOKENS),
    'seed': (1, MOST_SEED),
}


def evaluate_at_the_end(args: argparse.Namespace) -> None:
    """Let a run without ``--eval-interval`` be what Megatron says of it: none during training.

    Core 0.19 has no default for it, and divides the iterations by it all the same.
    """
    if getattr(args, 'eval_interval', 0) is None:
        # More iterations than any run has.
        args.eval_interval = MOST_TOKENS


def check_sizes(args: argparse.Namespace) -> None:
    """Raise ValueError for the first size of Megatron's that cannot be one."""
    if not _asks_for_ours(args):
        return
    for name, (least, most) in SIZES.items():
        value = getattr(args, name, None)
        if value is not None:
            check_integer(flag_of(name), value, least, most, 'give a size that a job can have')
    for text in getattr(args, 'rampup_batch_size', None) or ():
        if not str(text).isdecimal() or not 0 <= int(text) <= MOST_TOKENS:
            raise ValueError(
                f'--rampup-batch-size {shown(str(text))}: wanted integers from 0 to {MOST_TOKENS}; '
                'give a start, an increment and a number of samples'
            )


def _asks_for_ours(args: argparse.Namespace) -> bool:
    return (
        getattr(args, 'residual_type', 'standard') != 'standard'
        or getattr(args, 'engram_layers', None) is not None
        or getattr(args, 'pipeline_schedule', None) is not None
        or getattr(args, 'mhc_post_stream', None) == 'high'
        or getattr(args, 'lr_decay_style', None) == STYLE
    )
