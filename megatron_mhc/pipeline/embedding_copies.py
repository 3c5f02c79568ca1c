"""Copies of the word embedding on a pipeline: which chunks hold one, and what is refused.

The embedding is in the first stage. The last stage has a copy where the output layer is tied to it,
and the stage of multi-token prediction has one in any case. Megatron fills the copies and sums
their gradients by an all-reduce between pipeline ranks, in which a rank takes part with one copy;
``tied_embedding`` does both on a rank that holds all of them.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.settings.names import MIRRORED_SCHEDULES, V_SCHEDULES

LAYOUT = '--pipeline-model-parallel-layout'
UNTIE = '--untie-embeddings-and-output-weights'


def one_rank_holds_all(layout: Any, tied: bool, inverted_v: bool = False) -> bool:
    """Whether one pipeline rank holds several copies, in several chunks, and no other rank any.

    Args:
        layout: Megatron's ``PipelineParallelLayerLayout``; None for the even division.
        tied: whether the output layer multiplies by the word embedding.
        inverted_v: whether the embedding group is the last pipeline rank alone.

    Raises:
        ValueError: a rank would hold two copies and another rank one more, or a V spreads them.
    """
    held = _holders(layout, tied)
    ranks = sorted(set(held))
    if len(ranks) > 1 and (inverted_v or len(held) > len(ranks)):
        way_out = '' if inverted_v or not tied else f', or {UNTIE}'
        raise ValueError(
            f'{LAYOUT} {layout}: pipeline ranks {" and ".join(map(str, ranks))} hold {len(held)} '
            'copies of the word embedding, which the all-reduce between ranks cannot keep equal, '
            f'as it takes one copy of every rank in its group; put m beside L{way_out}'
        )
    return len(ranks) == 1 and len(held) > 1


def check_embedding_group(layout: Any, tied: bool, rank: int, is_member: bool) -> None:
    """Raise ValueError for a script that did not tell Megatron which ranks hold a copy.

    A rank without a copy would have its output layer summed into the embedding.

    Args:
        layout: as above, of a model with prediction layers.
        tied: as above.
        rank: this process's pipeline rank.
        is_member: whether it is in Megatron's embedding group.
    """
    held = _holders(layout, tied)
    if held and (rank in held) != is_member:
        raise ValueError(
            f'{LAYOUT} {layout}: pipeline ranks {sorted(set(held))} hold the copies of the word '
            f'embedding, but rank {rank} is {"" if is_member else "not "}in the embedding group; '
            'the script must pass get_embedding_ranks to pretrain, as examples/pretrain_gpt.py does'
        )


def _holders(layout: Any, tied: bool) -> list[int]:
    """The pipeline rank of every copy that ``layout`` asks for."""
    if layout is None:
        return []
    kinds = {'embedding', 'mtp', 'loss'} if tied else {'embedding', 'mtp'}
    return [
        rank
        for rank, chunks in enumerate(layout.layout)
        for layers in chunks
        if kinds.intersection(layer.name for layer in layers)
    ]


def output_layer_is_beside_prediction(layout: Any) -> bool:
    """Whether prediction layers and output layer are in one chunk, as they are without a layout."""
    if layout is None:
        return True
    kinds = [{layer.name for layer in layers} for chunks in layout.layout for layers in chunks]
    return any({'mtp', 'loss'} <= names for names in kinds)


def check_embedding_copies(args: argparse.Namespace, patched: bool) -> None:
    """Check the parsed arguments of a run with multi-token prediction and several pipeline ranks.

    Args:
        args: Megatron's arguments, the layout of a V among them.
        patched: whether anything of ours is asked for, so that ``tied_embedding`` is at work;
            without it Megatron is left as it is, and what it does wrong is said.

    Raises:
        ValueError: the run would wait for ever, or could not save or load.
    """
    ranks = getattr(args, 'pipeline_model_parallel_size', None) or 1
    if not getattr(args, 'mtp_num_layers', None) or ranks < 2:
        return
    schedule = getattr(args, 'pipeline_schedule', None)
    if schedule in MIRRORED_SCHEDULES:
        # Each end has the first stage and the last one, of different copies of the model.
        return
    inverted_v = patched and schedule in V_SCHEDULES
    layout = _layout_of(args.pipeline_model_parallel_layout, ranks, inverted_v)
    tied = not args.untie_embeddings_and_output_weights
    together = one_rank_holds_all(layout, tied, inverted_v)
    if patched:
        return
    if together:
        announce(
            f'{LAYOUT} {layout}: one pipeline rank holds two copies of the word embedding, whose '
            'gradients Megatron does not sum, so that they part and both learn too little; put m '
            'beside L (with --residual-type or --pipeline-schedule of ours they are summed)'
        )
    stored = args.save or args.load or getattr(args, 'pretrained_checkpoint', None)
    unreadable = stored and args.ckpt_format != 'torch'
    if tied and unreadable and output_layer_is_beside_prediction(layout):
        raise ValueError(
            f'--mtp-num-layers {args.mtp_num_layers} with --pipeline-model-parallel-size {ranks} '
            'and tied embeddings: Megatron can neither save nor load this model, as it gives the '
            f'last stage an output weight that nothing reads; add {UNTIE}'
        )


def _layout_of(layout: str | None, ranks: int, inverted_v: bool) -> Any:
    # Imported here: --help needs no megatron.core.
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    from megatron_mhc.pipeline.layer_layout import InvertedVLayout

    if layout is None:
        return None
    try:
        return (InvertedVLayout if inverted_v else PipelineParallelLayerLayout)(layout, ranks)
    except (AssertionError, KeyError):
        # What is no layout, Megatron refuses in its own words.
        return None
