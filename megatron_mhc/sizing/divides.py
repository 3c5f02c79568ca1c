"""What ranks may divide of a model: why some layouts do not exist, whatever the number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mhc.settings.hybrid_stages import LAYERS
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.sizing.shape import GroupedAttention, ModelShape
from megatron_mhc.sizing.stages import pieces

# Whether it is wrong, the words, the remedy; a later check may rely on those before it.
Checks = Iterator[tuple[bool, str, str]]


def model_checks(shape: ModelShape, tp: int, cp: int, ep: int, stages: int) -> Checks:
    """What a model does not take of its ranks.

    Args:
        shape: the model.
        tp, cp, ep: ranks that share tensors, a sequence, experts.
        stages: of the pipeline.
    """
    attention, experts = shape.attention, shape.experts
    heads = attention.groups if isinstance(attention, GroupedAttention) else attention.heads
    yield (
        bool(attention.heads % tp or heads % tp),
        'the attention heads, or their groups, do not divide by tp',
        f'choose a --tp that divides {heads}',
    )
    yield from _mixer_checks(shape, tp, cp)
    divided = [shape.vocab, shape.sequence, shape.ffn, shape.hidden]
    if experts:
        divided += [experts.ffn, experts.shared_ffn]
    yield (
        any(size % tp for size in divided),
        'vocabulary, sequence or widths do not divide by tp',
        'choose a smaller --tp',
    )
    # Each rank has an early and a late part, so that a causal mask loads them evenly.
    yield (
        cp > 1 and bool(shape.sequence % (2 * cp * tp)),
        'the sequence does not divide by 2 x cp x tp',
        'choose a smaller --cp',
    )
    count = experts.count if experts else 1
    words = 'the experts do not divide by ep' if experts else 'the model has no experts'
    yield bool(count % ep), words, f'choose an --ep that divides {count}'
    parts = len(pieces(shape.pattern)) if shape.pattern else shape.layers
    yield (
        parts < stages,
        'fewer layers than stages' if parts == shape.layers else 'fewer parts than stages',
        f'choose --pp, and --vpp, with at most {parts} stages; a V has 2 a rank',
    )


def _mixer_checks(shape: ModelShape, tp: int, cp: int) -> Checks:
    """Of ``M`` and ``G`` in a hybrid pattern."""
    for symbol, counts in (
        ('M', shape.mamba and (shape.mamba.groups, shape.mamba.heads)),
        ('G', shape.delta_net and (shape.delta_net.key_heads,)),
    ):
        yield (
            any(count % tp for count in counts or ()),
            f'the heads of {LAYERS[symbol]} layers, or their groups, do not divide by tp',
            f'choose a --tp that divides {counts and counts[0]}',
        )
        yield (
            cp > 1 and counts is not None,
            f'context parallelism of {LAYERS[symbol]} layers is not modelled',
            'choose --cp 1',
        )


def check_model(shape: ModelShape, layout: Layout) -> None:
    """Refuse a layout that the sizes of the model do not divide by.

    Raises:
        ValueError: the ranks, why not, and what to change.
    """
    ranks = layout.tp, layout.cp, layout.ep
    for wrong, words, remedy in model_checks(shape, *ranks, layout.stages):
        if wrong:
            tp, cp, ep = ranks
            raise ValueError(f'--tp {tp} --cp {cp} --ep {ep}: {words}; {remedy}')
