"""What a segment of recomputed sublayers costs (mHC, section 4.3.2, Eq 20). No torch, no Megatron.

Unit: C values a token. L sublayers of one pipeline stage (or virtual chunk), attention and MLP each
counted, in segments of L_r; n streams. A sublayer's output, C values, is kept in any case.
"""

from __future__ import annotations

import functools
import math


def kept_cost(n: int, sublayers: int, size: int) -> int:
    """What is kept from the forward on: the first streams of a segment, ``n * ceil(L / L_r)``."""
    return n * math.ceil(sublayers / size)


def segment_cost(n: int, sublayers: int, size: int) -> int:
    """The most that is alive, as one segment is rebuilt: ``n * ceil(L / L_r) + (n + 2) * L_r``.

    Args:
        n: residual streams.
        sublayers: L.
        size: L_r, sublayers in a segment; one that is larger than L is one of L.

    Returns:
        C values a token: streams, sublayer input and its norm for each sublayer of the segment.
    """
    size = min(size, sublayers)
    return kept_cost(n, sublayers, size) + (n + 2) * size


def whole_cost(n: int, sublayers: int) -> int:
    """What is alive without recomputation: ``(n + 2) * L`` C values a token."""
    return (n + 2) * sublayers


@functools.cache
def best_segment(n: int, sublayers: int) -> int:
    """The L_r of the least ``segment_cost``, about sqrt(n * L / (n + 2)); the least of equals."""
    return min(
        range(1, sublayers + 1), key=lambda size: segment_cost(n, sublayers, size), default=1
    )


def segment_size(layer_num: int | str, n: int, sublayers: int) -> int:
    """``--mhc-recompute-layer-num`` in sublayers; 0 is no recomputation.

    Args:
        layer_num: ``none``, ``stage`` (one segment), ``auto`` (``best_segment``) or L_r.
        n: residual streams.
        sublayers: L.
    """
    if layer_num == 'none':
        return 0
    if layer_num == 'auto':
        return best_segment(n, sublayers)
    return max(1, sublayers if layer_num == 'stage' else min(int(layer_num), sublayers))
