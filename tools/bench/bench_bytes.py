"""Ideal traffic of each op, from the formulas of our kernels, and the targets set against it.

An element is one C-wide vector per token in the dtype of the streams. Maps are fp32. The figures
count what our kernels read and write, each tensor once; a contender that moves more shows fewer of
these GB/s, so that they compare between implementations.
"""

from __future__ import annotations

from megatron_mhc.kernels.peers.contender import LAYER, Case
from megatron_mhc.kernels.traffic import Traffic, kernel_forms, our_forms

FORWARD, BACKWARD, BOTH = 'fwd', 'bwd', 'fwd+bwd'
# op -> its forward and its backward in ``our_forms``.
FORMS = {
    'mapping': ('mapping', 'mapping backward'),
    'pre': ('F_pre', 'F_pre backward'),
    'post': ('F_post,res', 'F_post,res backward'),
    'sublayer': ('forward in three passes', 'backward at the fused edge'),
    'fused_edge': ('forward at the fused edge', 'backward at the fused edge'),
}


def traffic(op: str, direction: str, streams: int) -> list[Traffic]:
    """What moves per token; for ``layer``, in all its sublayers."""
    if direction == BOTH:
        return traffic(op, FORWARD, streams) + traffic(op, BACKWARD, streams)
    if op == 'sinkhorn':
        return [
            kernel_forms(streams)[f'sinkhorn_{"forward" if direction == FORWARD else "backward"}']
        ]
    if op == 'layer' and direction == FORWARD:
        # One read, the edges, one write: a sublayer and LAYER - 1 edges.
        edges = traffic('fused_edge', FORWARD, streams) * (LAYER - 1)
        return traffic('sublayer', FORWARD, streams) + edges
    if op == 'layer':
        return traffic('sublayer', BACKWARD, streams) * LAYER
    return [our_forms(streams)[FORMS[op][direction == BACKWARD]]]


def ideal_elements(op: str, direction: str, streams: int) -> float:
    """C-wide vectors per token, per sublayer for ``layer``."""
    parts = traffic(op, direction, streams)
    return sum(part.elements for part in parts) / _sublayers(op)


def ideal_bytes(op: str, direction: str, case: Case) -> int:
    """Bytes of one call, per sublayer for ``layer``: streams, fp32 maps and the projection."""
    itemsize = case.torch_dtype.itemsize
    parts = traffic(op, direction, case.streams)
    tokens = sum(part.bytes(case.tokens, case.hidden, itemsize) for part in parts)
    # Forward reads the fp32 weight, backward reads it and writes its gradient.
    times = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[direction]
    weight = 4 * case.maps * case.streams * case.hidden if op not in NO_WEIGHT else 0
    return round(tokens / _sublayers(op) + times * weight)


def _sublayers(op: str) -> int:
    return LAYER if op == 'layer' else 1


NO_WEIGHT = ('sinkhorn', 'pre', 'post')
# Share of the copy bandwidth measured in the same run.
COPY_TARGETS = {
    ('pre', FORWARD): 0.92,
    ('post', FORWARD): 0.92,
    ('fused_edge', FORWARD): 0.85,
    ('sublayer', BACKWARD): 0.83,
}
# Microseconds for 8192 tokens.
TIME_TARGETS = {('sinkhorn', FORWARD): 8.0, ('sinkhorn', BACKWARD): 15.0}
TIME_TARGET_TOKENS = 8192


def target(
    op: str, direction: str, case: Case, median_us: float, copy_share: float
) -> tuple[str, str]:
    """``(target, met or missed)`` of one of our rows; both empty where none is set."""
    share = COPY_TARGETS.get((op, direction))
    if share is not None:
        return f'>= {share:.0%} of copy', 'met' if copy_share >= share else 'missed'
    limit = TIME_TARGETS.get((op, direction))
    if limit is not None and case.tokens == TIME_TARGET_TOKENS:
        return f'<= {limit:g} us', 'met' if median_us <= limit else 'missed'
    return '', ''
