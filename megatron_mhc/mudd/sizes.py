"""Parameters and operations that dense connections add, exactly; no torch needed.

Layers are given as the symbols of a hybrid pattern; a layer of a GPT model is one ``*``, to which
its MLP belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

WAYS = ('query', 'key', 'value', 'residual')
# Layers that mix no tokens: they end the block that attention, or another mixer, begins.
CHANNELS = ('-', 'E')


def ways_after(layers: Sequence[str]) -> list[int]:
    """How many ways leave each layer: none inside a block, else what the next block reads.

    Attention reads four, and any other mixer, which has one input, the residual alone; so does the
    final norm. A block is a mixer with what follows it up to the next one: what a transformer has
    as a layer, ``*-``.
    """
    read = {'*': len(WAYS)} | dict.fromkeys(CHANNELS, 0)
    return [*(read.get(following, 1) for following in layers[1:]), 1]


def _aggregates(layers: Sequence[str]) -> Iterator[tuple[int, int]]:
    """After block i, which has i + 1 outputs behind it, embedding included: K, and ways (i + 1)."""
    blocks = filter(None, ways_after(layers))
    for outputs, ways in enumerate(blocks, 2):
        yield len(WAYS) * outputs, ways * outputs


def mudd_parameters(
    hidden: int, layers: Sequence[str], dynamic: bool, norm_vectors: int = 1
) -> int:
    """Of all aggregates, and of the norms that keys and values have to themselves.

    After block i, with K = 4 (i + 1): W1 hidden x K, W2 K x (ways (i + 1)), a ways (i + 1). Of a
    transformer in all about 2 L (L + 3) hidden: a share of (L + 3) / (6 hidden) of its
    12 L hidden^2 (section 3.4).

    Args:
        hidden: C.
        layers: their symbols.
        dynamic: whether the weights depend on the token.
        norm_vectors: of a norm, 1 for RMSNorm, 2 for LayerNorm.
    """
    total = 2 * layers.count('*') * norm_vectors * hidden
    for inner, outputs in _aggregates(layers):
        total += outputs
        if dynamic:
            total += inner * hidden + inner * outputs
    return total


def mudd_flops(hidden: int, layers: Sequence[str], dynamic: bool) -> int:
    """Forward FLOPs of one token: 2 hidden K + 2 K ways (i + 1) for the weights after block i, and
    2 hidden ways (i + 1) for the sums; in all about 8 L (L + 3) hidden (section 3.4).
    """
    total = 0
    for inner, outputs in _aggregates(layers):
        total += 2 * hidden * outputs
        if dynamic:
            total += 2 * hidden * inner + 2 * inner * outputs
    return total
