"""A model of context parallelism: keys and values go round a ring of ranks behind attention.

Each rank works on the share that it has while the next one arrives, as Transformer Engine's
``p2p`` does; what a message takes longer than that is exposed. No run has been compared with it.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_mhc.sizing.memory import Layout
from megatron_mhc.sizing.shape import GroupedAttention, ModelShape
from megatron_mhc.study.links import Group


class Ring(NamedTuple):
    """Of a layer and microbatch: exposed seconds of both directions, and bytes sent."""

    forward: float
    backward: float
    sent: float


def ring_of(
    shape: ModelShape, layout: Layout, group: Group, tokens: int, core: tuple[float, float]
) -> Ring:
    """The ring of one layer.

    Args:
        shape: the model.
        layout: its tp divides the heads; cp - 1 messages go from each rank.
        group: the context-parallel ranks.
        tokens: of a microbatch on one of them.
        core: seconds of attention, forward and backward; a share of 1 / cp covers a message.
    """
    size = shape.value_bytes * tokens * kv_width(shape) // layout.tp
    steps = layout.cp - 1
    # In the backward the gradients of keys and values go along.
    forward, backward = (
        steps * max(0.0, group.message_seconds(width) - seconds / layout.cp)
        for width, seconds in zip((size, 2 * size), core, strict=True)
    )
    return Ring(forward, backward, 3 * steps * size)


def kv_width(shape: ModelShape) -> int:
    """Values of a token's keys and values, of all heads; a latent is unfolded before they go."""
    attention = shape.attention
    if isinstance(attention, GroupedAttention):
        return 2 * attention.groups * attention.head_dim
    return attention.heads * (attention.qk_dim + attention.rope_dim + attention.v_dim)
