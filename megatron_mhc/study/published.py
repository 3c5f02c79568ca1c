"""Published figures that a study is measured against."""

from __future__ import annotations

from typing import NamedTuple


class ZeroBubble(NamedTuple):
    """One setting of Zero Bubble Pipeline Parallelism, arXiv 2401.10241.

    Args:
        pp, microbatches: p and m.
        profile: milliseconds of F, of B (our I), of W and of communication (table 9).
        layers: of the model (table 3); 1F1B-I has one a chunk.
        rates: bubble rates of 1F1B, 1F1B-I and ZB-H1 (table 5).
    """

    pp: int
    microbatches: int
    profile: tuple[float, float, float, float]
    layers: int
    rates: tuple[float, float, float]


ZERO_BUBBLE = [
    ZeroBubble(8, 24, (18.522, 18.086, 9.337, 0.601), 24, (0.2431, 0.1055, 0.1585)),
    ZeroBubble(8, 32, (18.513, 18.086, 9.331, 0.626), 24, (0.1985, 0.0818, 0.1242)),
    ZeroBubble(8, 64, (18.546, 18.097, 9.321, 0.762), 24, (0.1240, 0.0443, 0.0674)),
    ZeroBubble(8, 24, (29.718, 29.444, 19.927, 0.527), 32, (0.2347, 0.0808, 0.1323)),
    ZeroBubble(8, 32, (29.802, 29.428, 19.530, 0.577), 32, (0.1898, 0.0628, 0.1045)),
    ZeroBubble(8, 64, (29.935, 29.621, 19.388, 0.535), 32, (0.1091, 0.0320, 0.0554)),
    ZeroBubble(16, 48, (11.347, 11.248, 8.132, 0.377), 48, (0.2552, 0.1104, 0.1397)),
    ZeroBubble(16, 64, (11.307, 11.254, 8.101, 0.379), 48, (0.2082, 0.0852, 0.1088)),
    ZeroBubble(16, 128, (11.325, 11.308, 8.109, 0.378), 48, (0.1251, 0.0445, 0.0576)),
    ZeroBubble(32, 96, (10.419, 10.207, 7.715, 0.408), 64, (0.2646, 0.1493, 0.1421)),
    ZeroBubble(32, 128, (10.408, 10.204, 7.703, 0.408), 64, (0.2168, 0.1164, 0.1106)),
    ZeroBubble(32, 256, (10.402, 10.248, 7.698, 0.460), 64, (0.1352, 0.0624, 0.0594)),
]

# DeepSeek-V3 (arXiv 2412.19437), table 2, where F&B takes F + B: bubble from P, F, I and W with
# B = I + W, and copies of the parameters, and activations in those of a rank and microbatch.
DUALPIPE = {
    '1f1b': (lambda p, f, i, w: (p - 1) * (f + i + w), 1, lambda p: p),
    'zb-h1': (lambda p, f, i, w: (p - 1) * (f + i + w - 2 * w), 1, lambda p: p),
    'dualpipe': (
        lambda p, f, i, w: (p / 2 - 1) * ((f + i + w) + (i + w) - 3 * w),
        2,
        lambda p: p + 1,
    ),
}

# Manifold-constrained hyper-connections (arXiv 2512.24880), section 4.3.3: time on top, n = 4.
MHC_OVERHEAD = 0.067
