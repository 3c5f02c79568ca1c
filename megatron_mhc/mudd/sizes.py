"""Parameters and operations that dense connections add, exactly; no torch needed."""

from __future__ import annotations

WAYS = ('query', 'key', 'value', 'residual')


def ways_after(layer: int, layers: int) -> int:
    """How many ways leave layer ``layer`` (from 1): four, and the residual alone after the last."""
    return 1 if layer == layers else len(WAYS)


def mudd_parameters(hidden: int, layers: int, dynamic: bool, norm_vectors: int = 1) -> int:
    """Of all aggregates, and of the norms that keys and values have to themselves.

    After layer i, which has i + 1 outputs behind it (embedding included), and with K = 4 (i + 1):
    W1 hidden x K, W2 K x (ways (i + 1)), a ways (i + 1). In all about 2 L (L + 3) hidden: a share
    of (L + 3) / (6 hidden) of a transformer's 12 L hidden^2 (section 3.4).

    Args:
        norm_vectors: of a norm, 1 for RMSNorm, 2 for LayerNorm.
    """
    total = 2 * layers * norm_vectors * hidden
    for layer in range(1, layers + 1):
        inner, outputs = len(WAYS) * (layer + 1), ways_after(layer, layers) * (layer + 1)
        total += outputs
        if dynamic:
            total += inner * hidden + inner * outputs
    return total


def mudd_flops(hidden: int, layers: int, dynamic: bool) -> int:
    """Forward FLOPs of one token: 2 hidden K + 2 K ways (i + 1) for the weights after layer i, and
    2 hidden ways (i + 1) for the sums; in all about 8 L (L + 3) hidden (section 3.4).
    """
    total = 0
    for layer in range(1, layers + 1):
        inner, outputs = len(WAYS) * (layer + 1), ways_after(layer, layers) * (layer + 1)
        total += 2 * hidden * outputs
        if dynamic:
            total += 2 * hidden * inner + 2 * inner * outputs
    return total
