"""Parameters and FLOPs of the conditional memory: pure arithmetic."""

from __future__ import annotations

from megatron_mhc.engram.addresses import rows
from megatron_mhc.settings.engram import CONVOLUTION_WIDTH, EngramConfig


def table_parameters(engram: EngramConfig) -> int:
    """Parameters of one layer's tables, padded rows included."""
    return rows(engram) * engram.row_width


def reader_parameters(engram: EngramConfig, hidden: int, streams: int) -> int:
    """Of what reads them: n W_K and W_V of C x d_mem; three norms and the taps of n C each."""
    return (streams + 1) * hidden * engram.dim + (3 + CONVOLUTION_WIDTH) * streams * hidden


def engram_flops(engram: EngramConfig | None, hidden: int, streams: int) -> int:
    """Forward FLOPs of one token in all layers with a memory; 0 without.

    Per layer::

        keys, value     2 (n + 1) C d_mem
        gate            2 n C + n C        dot products, and what they weigh
        convolution     2 n C taps
        sums            2 n C              the skip, and into the streams
    """
    if engram is None:
        return 0
    wide = streams * hidden
    matrices = 2 * (streams + 1) * hidden * engram.dim
    return len(engram.layers) * (matrices + 3 * wide + 2 * wide * CONVOLUTION_WIDTH + 2 * wide)
